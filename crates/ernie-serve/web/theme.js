// Before anything is drawn: the theme that somebody chose, so that a dark page does not begin with a white one.
import { load } from "./storage.js";

const theme = load("theme") ?? (window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.documentElement.dataset.theme = theme;
