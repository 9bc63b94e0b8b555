// What the browser keeps. Anything may be missing, full or forbidden, and what is there may have been changed by hand.
const PREFIX = "ernie.";

function area(kind) {
  try {
    return kind === "session" ? window.sessionStorage : window.localStorage;
  } catch {
    return null;
  }
}

export function load(name, kind = "local") {
  try {
    const text = area(kind)?.getItem(PREFIX + name);
    return text === null || text === undefined ? null : JSON.parse(text);
  } catch {
    return null;
  }
}

/** Whether it is kept. */
export function save(name, value, kind = "local") {
  try {
    area(kind).setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export function forget(name, kind = "local") {
  try {
    area(kind)?.removeItem(PREFIX + name);
  } catch {
    // What cannot be reached is not there.
  }
}

/** Names that begin so. */
export function names(beginning, kind = "local") {
  try {
    const store = area(kind);
    const keys = Array.from({ length: store.length }, (_, index) => store.key(index));
    return keys.filter((key) => key.startsWith(PREFIX + beginning)).map((key) => key.slice(PREFIX.length));
  } catch {
    return [];
  }
}
