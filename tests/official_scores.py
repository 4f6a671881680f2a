"""The benchmarks' scoring rules, written down from their published scripts a second time, as those write them.

They are the references of tests/test_metrics.py and share nothing with the package. Sources: vqaEval.py of
GT-Vision-Lab/VQA; m4c_evaluators.py of facebookresearch/mmf; the evaluation script of DocVQA (rrc.cvc.uab.es), as in
lmms-eval's metrics.py; relaxed_correctness of pix2struct; calculation.py of MME; can_infer of VLMEvalKit.
"""

from __future__ import annotations

import re

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
NUMBER_WORDS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
CONTRACTIONS = dict(
    pair.split(" ")
    for pair in (
        "aint ain't|arent aren't|cant can't|couldve could've|couldnt couldn't|couldn'tve couldn't've|"
        "couldnt've couldn't've|didnt didn't|doesnt doesn't|dont don't|hadnt hadn't|hadnt've hadn't've|"
        "hadn'tve hadn't've|hasnt hasn't|havent haven't|hed he'd|hed've he'd've|he'dve he'd've|hes he's|howd how'd|"
        "howll how'll|hows how's|Id've I'd've|I'dve I'd've|Im I'm|Ive I've|isnt isn't|itd it'd|itd've it'd've|"
        "it'dve it'd've|itll it'll|let's let's|maam ma'am|mightnt mightn't|mightnt've mightn't've|"
        "mightn'tve mightn't've|mightve might've|mustnt mustn't|mustve must've|neednt needn't|notve not've|"
        "oclock o'clock|oughtnt oughtn't|ow's'at 'ow's'at|'ows'at 'ow's'at|'ow'sat 'ow's'at|shant shan't|"
        "shed've she'd've|she'dve she'd've|she's she's|shouldve should've|shouldnt shouldn't|"
        "shouldnt've shouldn't've|shouldn'tve shouldn't've|somebody'd somebodyd|somebodyd've somebody'd've|"
        "somebody'dve somebody'd've|somebodyll somebody'll|somebodys somebody's|someoned someone'd|"
        "someoned've someone'd've|someone'dve someone'd've|someonell someone'll|someones someone's|"
        "somethingd something'd|somethingd've something'd've|something'dve something'd've|somethingll something'll|"
        "thats that's|thered there'd|thered've there'd've|there'dve there'd've|therere there're|theres there's|"
        "theyd they'd|theyd've they'd've|they'dve they'd've|theyll they'll|theyre they're|theyve they've|twas 'twas|"
        "wasnt wasn't|wed've we'd've|we'dve we'd've|weve we've|werent weren't|whatll what'll|whatre what're|"
        "whats what's|whatve what've|whens when's|whered where'd|wheres where's|whereve where've|whod who'd|"
        "whod've who'd've|who'dve who'd've|wholl who'll|whos who's|whove who've|whyll why'll|whyre why're|whys why's|"
        "wont won't|wouldve would've|wouldnt wouldn't|wouldnt've wouldn't've|wouldn'tve wouldn't've|yall y'all|"
        "yall'll y'all'll|y'allll y'all'll|yall'd've y'all'd've|y'alld've y'all'd've|y'all'dve y'all'd've|youd you'd|"
        "youd've you'd've|you'dve you'd've|youll you'll|youre you're|youve you've"
    ).split("|")
)


def process_punctuation(text: str) -> str:
    result = text
    for mark in MARKS:
        if (mark + " " in text or " " + mark in text) or re.search(r"(\d)(\,)(\d)", text) is not None:
            result = result.replace(mark, "")
        else:
            result = result.replace(mark, " ")
    return re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", result, int(re.UNICODE))


def process_digits_and_articles(text: str) -> str:
    kept = []
    for word in text.lower().split():
        word = NUMBER_WORDS.get(word, word)
        if word not in ("a", "an", "the"):
            kept.append(word)
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def vqav2(prediction: str, answers: list[str]) -> float:
    """The loop of VQAEval.evaluate for one question."""
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    given = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(given)) > 1:
        given = [process_digits_and_articles(process_punctuation(answer)) for answer in given]
        prediction = process_digits_and_articles(process_punctuation(prediction))
    accuracies = []
    for left_out in range(len(given)):
        others = [answer for place, answer in enumerate(given) if place != left_out]
        accuracies.append(min(1, float(len([answer for answer in others if answer == prediction])) / 3))
    return float(sum(accuracies)) / len(accuracies)


def eval_ai(text: str) -> str:
    """EvalAIAnswerProcessor."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return process_digits_and_articles(process_punctuation(text))


def textvqa(prediction: str, answers: list[str]) -> float:
    """TextVQAAccuracyEvaluator for one question."""
    processed = list(enumerate(eval_ai(answer) for answer in answers))
    scores = {}
    for unique in {answer for _, answer in processed}:
        accuracies = []
        for pair in processed:
            matching = [other for other in processed if other != pair and other[1] == unique]
            accuracies.append(min(1, float(len(matching)) / 3))
        scores[unique] = sum(accuracies) / len(accuracies)
    return scores.get(eval_ai(prediction), 0.0)


def levenshtein(s1: str, s2: str) -> int:
    table = [[max(i, j) if min(i, j) == 0 else 0 for j in range(len(s2) + 1)] for i in range(len(s1) + 1)]
    for i in range(1, len(s1) + 1):
        for j in range(1, len(s2) + 1):
            replaced = table[i - 1][j - 1] + (s1[i - 1] != s2[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, replaced)
    return table[-1][-1]


def anls(prediction: str, answers: list[str]) -> float:
    values = []
    for answer in answers:
        gt = " ".join(answer.strip().lower().split())
        det = " ".join(prediction.strip().lower().split())
        length = max(len(answer.upper()), len(prediction.upper()))
        values.append(0.0 if length == 0 else float(levenshtein(gt, det)) / float(length))
    result = 1 - min(values)
    return 0.0 if result < 0.5 else result


def relaxed(prediction: str, target: str) -> bool:
    def to_float(text: str) -> float | None:
        try:
            if text.endswith("%"):
                return float(text.rstrip("%")) / 100.0
            return float(text)
        except ValueError:
            return None

    prediction_float, target_float = to_float(prediction), to_float(target)
    if prediction_float is not None and target_float:
        return abs(prediction_float - target_float) / abs(target_float) <= 0.05
    return prediction.lower() == target.lower()


def mme(rows: list[tuple[str, str, str, str]]) -> float:
    """The score of one kind of question: rows of image, question, answer and prediction, two for each image."""
    correct = pairs = 0
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        right = 0
        for _, _, answer, prediction in (first, second):
            prediction = prediction.lower()
            if prediction in ("yes", "no"):
                label = prediction
            elif "yes" in prediction[:4]:
                label = "yes"
            elif "no" in prediction[:4]:
                label = "no"
            else:
                label = "other"
            right += label == answer.lower()
        correct += right
        pairs += right == 2
    return 100 * correct / len(rows) + 100 * pairs / (len(rows) / 2)


def can_infer(answer: str, choices: dict[str, str]) -> str | None:
    """VLMEvalKit's choice without a language model as a judge; None where it gives up."""
    spaced = answer
    for mark in ".()[],:;!*#{}":
        spaced = spaced.replace(mark, " ")
    splits = [word.strip() for word in spaced.split()]
    count = sum(1 for choice in choices if choice in splits)
    if count == 1:
        for choice in choices:
            if choice in splits and splits.index(choice) > len(splits) - 5:
                return choice
    elif count == 0 and sum(1 for choice in ("Z", "") if choice in splits) == 1:
        return None
    lowered = answer.lower()
    if len(lowered) > 2 * sum(len(str(text)) for text in choices.values()):
        return None
    candidates = [letter for letter, text in choices.items() if str(text).lower() in lowered]
    return candidates[0] if len(candidates) == 1 else None


def pope(predictions: list[str], labels: list[str]) -> tuple[float, float, float, float, float]:
    """Accuracy, precision, recall, F1 and the share of yes, as in POPE's evaluate.py."""
    says = []
    for text in predictions:
        if text.find(".") != -1:
            text = text.split(".")[0]
        words = text.replace(",", "").split(" ")
        says.append(0 if "No" in words or "not" in words or "no" in words else 1)
    known = [0 if label == "no" else 1 for label in labels]
    tp = sum(p == 1 and k == 1 for p, k in zip(says, known, strict=True))
    fp = sum(p == 1 and k == 0 for p, k in zip(says, known, strict=True))
    tn = sum(p == 0 and k == 0 for p, k in zip(says, known, strict=True))
    fn = sum(p == 0 and k == 1 for p, k in zip(says, known, strict=True))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    f1 = 2 * precision * recall / (precision + recall)
    return (tp + tn) / (tp + tn + fp + fn), precision, recall, f1, says.count(1) / len(says)
