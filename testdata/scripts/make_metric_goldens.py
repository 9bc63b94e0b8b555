"""Makes testdata/metrics/golden.json: what rouge-score 0.1.2 and sacrebleu 2.5.1 give for short texts of our own making.

    pip install rouge-score==0.1.2 sacrebleu==2.5.1
    python testdata/scripts/make_metric_goldens.py
"""

import json
from pathlib import Path

import sacrebleu
from rouge_score import rouge_scorer

PAIRS = [  # target, prediction
    ("The cat sat on the mat.", "The cat sat on the mat."),
    ("The cat sat on the mat.", "A cat was sitting on a mat, the cat."),
    ("The cat sat on the mat.", ""),
    ("", "Nothing to compare with."),
    ("One two three four five six", "six five four three two one"),
    ("a a a b b", "a a b b b a"),
    ("The meeting was opened at 9:30.\nThe budget was agreed on.\nNobody objected.",
     "Nobody objected to the budget.\nThe meeting began at 9:30."),
    ("Line one\n\nline two\nline three", "line three\nline two line one"),
    ("It's 3.14, not 22/7 -- don't you know?", "its 3 14 not 22 7, do you know?"),
    ("Voilà, naïve café: the price is €5.", "voila naive cafe the price is 5"),
    ("Grüße aus Köln, İstanbul and Straße", "grusse aus koln istanbul and strasse"),
    ("the the the the the the the", "the cat"),
    ("x y z w\nx y", "x y\nz w x y"),
    ("今天 the weather is 好 today", "the weather today is 好"),
]
BLEU = [  # name, tokenize, predictions, references of each
    ("equal", "13a", ["The cat sat on the mat.", "It was warm outside."], [["The cat sat on the mat."], ["It was warm outside."]]),
    ("near", "13a", ["The cat sat on a mat.", "It was very warm outside, wasn't it?"],
     [["The cat sat on the mat."], ["It was warm outside, was it not?"]]),
    ("several references", "13a", ["the quick brown fox jumped over the dog"],
     [["the quick brown fox jumps over the lazy dog", "a quick brown fox jumped over a dog", "the fox jumped"]]),
    ("short", "13a", ["The cat", "sat"], [["The cat sat on the mat and looked around."], ["It sat there."]]),
    ("nothing in common", "13a", ["alpha beta gamma delta epsilon"], [["one two three four five"]]),
    ("no four-gram", "13a", ["the cat is here"], [["here is the cat"]]),
    ("empty", "13a", ["", "a b c d e"], [["something"], ["a b c d e f"]]),
    ("punctuation", "13a", ["Prices rose 3.5% (to $1,200.50) on 12-10-2024; \"why?\" -- he said: <skipped>&quot;yes&quot; &amp; left."],
     [["Prices rose 3.5 % to $1,200.50 on 12-10-2024: \"Why?\", he said \"yes\" & left."]]),
    ("chinese", "zh", ["今天天气很好，我们去公园玩。", "他买了3.5公斤apple"], [["今天天气不错，我们去公园玩吧。"], ["他买了3.5公斤的apple。"]]),
    ("chinese symbols", "zh", ["价格“很高”——约￥１２…", "《红楼梦》第1-2章"], [["价格“较高”——大约￥１２…"], ["《红楼梦》第1-3章"]]),
]


def main():
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=False)
    rouge = []
    for target, prediction in PAIRS:
        scores = scorer.score(target, prediction)
        rouge.append({"target": target, "prediction": prediction} | {name: score._asdict() for name, score in scores.items()})
    bleu = []
    for name, tokenize, predictions, references in BLEU:
        most = max(map(len, references))
        # One list for each place of a reference; None where a prediction has fewer.
        streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
        score = sacrebleu.BLEU(tokenize=tokenize).corpus_score(predictions, streams)
        bleu.append({"name": name, "tokenize": tokenize, "predictions": predictions, "references": references, "score": score.score,
                     "precisions": score.precisions, "bp": score.bp, "sys_len": score.sys_len, "ref_len": score.ref_len})
    path = Path(__file__).resolve().parent.parent / "metrics" / "golden.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"rouge": rouge, "bleu": bleu}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
