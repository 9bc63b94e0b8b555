# Makes testdata/tokenizers: small tokenizers and what the reference packages give for them.
#
# Made with Python 3.11, sentencepiece 0.2.3, tokenizers 0.23.3, transformers 5.23.0, jinja2 3.1.6.
# Usage: python make_tokenizer_goldens.py DATA_ROOT [OUT_DIR]
#   DATA_ROOT holds pretrain_en/, pretrain_zh/ and emoji_noto/ (see the repository's data notes).
#
# Text taken from there: TinyStories (CDLA-Sharing-1.0), classic books (public domain), KdConv (Apache-2.0), chinese-poetry and
# xiehouyu (MIT), emoji names (MIT). Everything else is made up here.
#
# Files (all numbers are LEB128 varints):
#   strings.bin      count, then per string: bytes, contents. The last strings are not valid UTF-8.
#   NAME.model/.json the tokenizer
#   NAME.golden      per string: n ids, ids, text; then number of random id sequences, per sequence: n ids, ids, text.
#                    A text is 0 where it equals the string, else 1 + its bytes, contents.
#   chat.json        conversations, template sources, and the prompts that transformers renders.
import glob, io, json, os, random, re, sys, unicodedata
import sentencepiece, tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

DATA = sys.argv[1]
OUT = sys.argv[2] if len(sys.argv) > 2 else os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tokenizers")
os.makedirs(OUT, exist_ok=True)
rng = random.Random(7)


def read_corpora():
    """English and Chinese lines, and (emoji, name) pairs."""
    english = open(f"{DATA}/pretrain_en/tinystories_excerpt/tinystories.txt", encoding="utf-8", errors="replace").read().split("\n")
    english = english[:9000]
    for name in ["Aesop_Aesop_s_Fables", "Carlo_Collodi_The_Adventures_of_Pinocchio"]:
        english += open(f"{DATA}/pretrain_en/classic_books/{name}.md", encoding="utf-8", errors="replace").read().split("\n")
    chinese = []
    for path in sorted(glob.glob(f"{DATA}/pretrain_zh/kdconv/*/dev.json")):
        for dialogue in json.load(open(path, encoding="utf-8"))[:120]:
            chinese += [turn["message"] for turn in dialogue["messages"]]
    for entry in json.load(open(f"{DATA}/pretrain_zh/xiehouyu/xiehouyu.json", encoding="utf-8"))[:1500]:
        chinese.append(f"{entry['riddle']}——{entry['answer']}")
    for poem in json.load(open(f"{DATA}/pretrain_zh/chinese_poetry/宋词/ci.song.0.json", encoding="utf-8"))[:100]:
        chinese += poem["paragraphs"]
    rows = [line.rstrip("\n").split("\t") for line in open(f"{DATA}/emoji_noto/captions.tsv", encoding="utf-8")][1:]
    keep = lambda lines: [line.strip() for line in lines if 4 <= len(line.strip()) <= 400 and "\ufffd" not in line]
    return keep(english), keep(chinese), [(row[1], row[2], row[4]) for row in rows]


ENGLISH, CHINESE, EMOJI = read_corpora()

SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n\n", "\u3000", "\u00a0", "\u2003", "\u200b", "\u2028", "\ufeff", " \t ", "\u2581", "\u0085"]
ODD = ["\0", "\x01", "\x07", "\x08", "\x0b", "\x0c", "\x1b[31m", "\x1f", "\x7f", "\x80", "\u00ad", "\u202e", "\ufffd", "\uffff", "\U0010ffff",
       "\ue000", "\ufdd0"]
WIDE = ["ＡＢＣ", "１２３", "！？", "ｶﾞｷﾞ", "㈱", "①②", "ﬁﬂ", "Ⅷ", "㌔", "½", "™", "ℵ", "ſ", "한글", "각", "ａ　ｂ"]
COMBINING = ["e\u0301", "n\u0303o", "a\u0308\u0304", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢", "क्षि", "ก็", "ở", "o\u031b\u0309", "\u0301x"]
SYMBOLS = ["<sep>", "<sep>>", "<se", "ab", "abc", "abcab", "abd", "你好", "你好吗", "😀", "😀😁", "0", "12", "007", "<|x|>", "<|x|", "<s>", "</s>", "<unk>", "<0x0A>",
           "<pad>", "▁the", "the▁", "<ctl>"]
EMOJI_SEQUENCES = ["👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇨🇳", "🇺🇸🇬🇧", "❤️‍🔥", "1️⃣", "🧑🏿‍🚀", "☺️", "👩‍❤️‍💋‍👨", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"]
INVALID = [b"\xff", b"\xfe\xff", b"\x80", b"\xc3", b"\xc3(", b"\xe4\xbd", b"\xe4\xbda", b"\xf0\x9f\x98", b"\xf0\x9f\x98\x80\x80", b"\xc0\xaf", b"\xe0\x80\xaf",
           b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xf5", b"a\x80b\xffc", b"\xef\xbf", b"\xe4\xbd\xa0\xe5\xa5"]


def make_strings():
    """At least 2,000 valid strings, and some that are not UTF-8."""
    strings = ["", " ", "a", "▁", "\0"]
    for pool in [SPACES, ODD, WIDE, COMBINING, SYMBOLS, EMOJI_SEQUENCES]:
        for item in pool:
            strings += [item, item * 3, "a" + item, item + "b", f"x {item} y", f"中{item}文"]
    strings += [line[:160] for line in rng.sample(ENGLISH, 450)]
    strings += [line[:80] for line in rng.sample(CHINESE, 350)]
    for emoji, english, chinese in rng.sample(EMOJI, 200):
        strings += [f"{emoji}", f"{english} {emoji}{chinese}"]
    for _ in range(150):
        strings.append("".join(rng.choice("0123456789.,-+% ") for _ in range(rng.randint(1, 24))))
    words = [word for line in rng.sample(ENGLISH, 60) for word in line.split()] + [line[:4] for line in rng.sample(CHINESE, 60)]
    pools = [words, words, SPACES, SPACES, ODD, WIDE, COMBINING, SYMBOLS, SYMBOLS, EMOJI_SEQUENCES, [emoji for emoji, _, _ in EMOJI]]
    for _ in range(600):
        strings.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(2, 14))))
    for _ in range(80):
        strings.append("".join(chr(rng.choice([rng.randint(1, 0x2ff), rng.randint(0x300, 0x2fff), rng.randint(0x3000, 0xd7ff),
                                               rng.randint(0xe000, 0xffff), rng.randint(0x10000, 0x2ffff)])) for _ in range(rng.randint(1, 20))))
    strings += [text for text in ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ab" * 60, "哈" * 50, "😀" * 20, "the " * 40, " " * 33]]
    strings = list(dict.fromkeys(strings))
    raw = list(INVALID)
    for _ in range(60):
        pieces = [rng.choice(words).encode() if rng.random() < 0.5 else rng.choice(INVALID) for _ in range(rng.randint(2, 8))]
        raw.append(b" ".join(pieces) if rng.random() < 0.5 else b"".join(pieces))
    for _ in range(40):
        raw.append(bytes(rng.randrange(256) for _ in range(rng.randint(1, 24))))
    return strings, raw


def varint(number):
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def replaced(raw):
    """Each byte that is not part of valid UTF-8 as one U+FFFD."""
    out, at = "", 0
    while at < len(raw):
        length = 1 if raw[at] < 0xC0 else 2 if raw[at] < 0xE0 else 3 if raw[at] < 0xF0 else 4
        try:
            out += raw[at : at + length].decode()
            at += length
        except UnicodeDecodeError:
            out += "\ufffd"
            at += 1
    return out


def write_golden(name, size, encode, decode):
    out = io.BytesIO()

    def entry(ids, text, same_as):
        out.write(varint(len(ids)) + b"".join(map(varint, ids)))
        text = text.encode()
        out.write(varint(0) if text == same_as else varint(1 + len(text)) + text)

    for string in STRINGS:
        ids = encode(string)
        entry(ids, decode(ids), string.encode())
    for raw in RAW:
        ids = encode(raw)
        entry(ids, decode(ids), raw)
    sequences = []
    random_ids = random.Random(11)
    for _ in range(300):
        span = random_ids.choice([(0, 300), (3, 259), (0, size), (0, size)])
        sequences.append([random_ids.randrange(span[0], min(span[1], size)) for _ in range(random_ids.randint(1, 12))])
    out.write(varint(len(sequences)))
    for ids in sequences:
        entry(ids, decode(ids), None)
    open(f"{OUT}/{name}.golden", "wb").write(out.getvalue())


def mark_unused(model, chosen):
    """The model with the pieces that `chosen` picks set to type UNUSED (appends `type: 5` to their messages)."""
    out, at, index = bytearray(), 0, 0

    def read():
        nonlocal at
        value = shift = 0
        while True:
            byte = model[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(model):
        start, tag = at, read()
        assert tag & 7 == 2
        length = read()
        message = model[at : at + length]
        at += length
        if tag >> 3 == 1:
            if chosen(index, message):
                message = message + b"\x18\x05"
                out += varint(tag) + varint(len(message)) + message
            else:
                out += model[start:at]
            index += 1
        else:
            out += model[start:at]
    return bytes(out)


def make_sentencepiece(name, unused=None, **options):
    buffer = io.BytesIO()
    lines = rng.sample(ENGLISH, 3000) + rng.sample(CHINESE, 500)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=buffer, num_threads=1, minloglevel=2, hard_vocab_limit=False, **options)
    model = buffer.getvalue()
    if unused:
        model = mark_unused(model, unused)
    open(f"{OUT}/{name}.model", "wb").write(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    write_golden(name, processor.get_piece_size(), processor.encode, processor.decode)


def make_json_bytelevel():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(ENGLISH[:3000] + CHINESE[:1500], trainer)
    tokenizer.add_tokens([AddedToken("<|x|>"), AddedToken("你好", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    finish_json("json_bytelevel", tokenizer)


def make_json_byte_fallback():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1300, limit_alphabet=300, special_tokens=["<unk>", "<s>", "</s>"] + byte_tokens, show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(ENGLISH[:3000] + CHINESE[:1500], trainer)
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    # Byte tokens are ordinary vocabulary, not added tokens.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    finish_json("json_byte_fallback", tokenizer)


def finish_json(name, tokenizer):
    text = tokenizer.to_str()
    open(f"{OUT}/{name}.json", "w", encoding="utf-8").write(text)
    encode = lambda text: tokenizer.encode(replaced(text) if isinstance(text, bytes) else text, add_special_tokens=False).ids
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    write_golden(name, tokenizer.get_vocab_size(), encode, decode)


CONVERSATIONS = [
    [("user", "Hello!")],
    [("system", "You are a kind assistant."), ("user", "Hi")],
    [("user", "What is 1+1?"), ("assistant", "2"), ("user", "Sure?\n")],
    [("system", "用中文回答。"), ("user", "你好 😀"), ("assistant", " 你好!  "), ("user", "再\"见\" <b>&'\\")],
    [("user", ""), ("assistant", ""), ("user", "\ttabs\tand\n\nlines\u0001")],
    [("user", "a"), ("assistant", "<think>\nhm\n</think>\nb"), ("user", "c"), ("assistant", "d")],
]
CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
THINKING = """{% set ns = namespace(last=-1, seen=false) %}
{% for message in messages %}
  {% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{% endfor %}
{{ bos_token }}{% for message in messages %}
{% set content = message.content %}
    {% if message.role == 'assistant' and '</think>' in content %}
        {% set content = content.split('</think>')[-1].lstrip('\\n') %}
    {% endif %}
[{{ message.role | upper }}{{ '*' if loop.index0 == ns.last else '' }}] {{ content | trim }}{{ eos_token if loop.last else ' | ' }}
{% endfor %}
{% if tools is not none %}TOOLS{% endif %}
{{ enable_thinking }} {{ add_generation_prompt }} {{ none }}
"""
JSONISH = """{# a comment #}
{{ messages | tojson }}
{{ messages | tojson(indent=2) }}
{{ {'b': [1, 2.5, true, none, []], 'a': {}} | tojson }}
{%- for message in messages[1:] %}
    {%- if message.content.startswith('a') %}{% continue %}{% endif %}
    {{ loop.index }}/{{ loop.length }} {{ message.get('name', 'nobody') }} {{ message.content.strip().upper() }} {{ message.content|length }}
    {%- if loop.index > 2 %}{% break %}{% endif %}
{%- endfor %}
{%- macro tag(name, text='-') -%}<{{ name }}>{{ text }}</{{ name }}>{%- endmacro %}
{{ tag('x') }}{{ tag('y', messages[-1].content|replace('a', 'e')) }}
{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}
{{ 'odd' if messages|length % 2 else 'even' }} {{ messages | map(attribute='role') | join(',') }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }}
{{ missing }}|{{ missing is defined }}|{{ messages[0].nothing }}|{{ 7 // 2 }}|{{ 2 ** 3 }}|{{ 'a' ~ 1 }}|{{ '%s-%d' | format('p', 3) }}
"""
GENERATION = """{% for m in messages %}
{%- if m.role == 'assistant' -%}{% generation %}{{ m.content }}{% endgeneration %}
{%- else %} {{- m.content -}} {% endif %}
{% endfor %}"""
REFUSING = """{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate, found ' + message.role) }}
{%- endif %}{{ message.content }}
{%- endfor %}"""


def make_chat():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    rust = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../crates/ernie-checkpoint/src/chat_template.rs"), encoding="utf-8").read()
    family = re.search(r'FAMILY_TEMPLATE: &str = r#"(.*?)"#', rust, re.S).group(1)
    templates = {"family": family, "chatml": CHATML, "thinking": THINKING, "jsonish": JSONISH, "generation": GENERATION, "refusing": REFUSING}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>"}
    cases = []
    for name, source in templates.items():
        template = _compile_jinja_template(source)
        for index, conversation in enumerate(CONVERSATIONS):
            for prompt in (False, True):
                for thinking in (None, False, True):
                    variables = dict(tokens, tools=None, messages=[dict(role=role, content=content) for role, content in conversation], add_generation_prompt=prompt)
                    if thinking is not None:
                        variables["enable_thinking"] = thinking
                    case = {"template": name, "conversation": index, "add_generation_prompt": prompt, "enable_thinking": thinking}
                    try:
                        case["text"] = template.render(**variables)
                    except Exception as error:
                        case["refused"] = str(error)
                    cases.append(case)
    fixture = {"tokens": tokens, "templates": {name: source for name, source in templates.items() if name != "family"}, "conversations": CONVERSATIONS, "cases": cases}
    json.dump(fixture, open(f"{OUT}/chat.json", "w", encoding="utf-8"), ensure_ascii=False, indent=0)


STRINGS, RAW = make_strings()
print(len(STRINGS), "strings,", len(RAW), "byte strings;", "sentencepiece", sentencepiece.__version__, "tokenizers", tokenizers.__version__)
with open(f"{OUT}/strings.bin", "wb") as out:
    everything = [string.encode() for string in STRINGS] + RAW
    out.write(varint(len(everything)) + b"".join(varint(len(string)) + string for string in everything))

DIGITS = [str(digit) for digit in range(10)]
OVERLAPPING = ["<sep>", "<sep>>", "ab", "abc", "你好", "😀", "😀😁", "<|x|>"]
plain = dict(add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True, character_coverage=0.98)
# Like the released family: digits are user-defined symbols.
make_sentencepiece("bpe_bytes", model_type="bpe", vocab_size=1300, user_defined_symbols=DIGITS, **plain)
make_sentencepiece("bpe_nfkc", model_type="bpe", vocab_size=1500, normalization_rule_name="nmt_nfkc", character_coverage=0.98)
make_sentencepiece("unigram_nfkc", model_type="unigram", vocab_size=1500, normalization_rule_name="nmt_nfkc", character_coverage=0.98)
make_sentencepiece("unigram_bytes", model_type="unigram", vocab_size=1400, user_defined_symbols=OVERLAPPING, control_symbols=["<ctl>"], unk_surface="?", **plain)
make_sentencepiece("bpe_suffix", unused=lambda index, piece: index > 40 and index % 3 == 0, model_type="bpe", vocab_size=1400, user_defined_symbols=OVERLAPPING,
                   normalization_rule_name="nfkc_cf", treat_whitespace_as_suffix=True, allow_whitespace_only_pieces=True, character_coverage=0.98, pad_id=3)
make_sentencepiece("unigram_unused", unused=lambda index, piece: index > 20 and index % 3 == 0, model_type="unigram", vocab_size=900,
                   normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98)
make_json_bytelevel()
make_json_byte_fallback()
make_chat()
