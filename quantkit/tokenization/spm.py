"""A SentencePiece model as the content of tokenizer.json, with the same ids for every text.

How it is done, and why it is exact, or refused where it would not be:

- BPE. SentencePiece joins by the score of the piece that comes about, tokenizers by the place of a pair in a list:
  `merges` has the proof that one pair a piece is enough. Pieces of the same score are joined leftmost first, which a
  list cannot say; it can for runs of one character, where the longer left half is the left one.
- Spaces become ▁ and the text gets one in front. What has no piece falls back to bytes. No pre-tokenizer cuts words.
- Control pieces are special tokens and match in text, because transformers renders a chat template to text first:
  "[INST]" becomes its id, as in the tokenizers that Mistral publishes. SentencePiece itself never reads a control piece
  from text; `split_special_tokens=True`, of the call or of `from_pretrained`, gives that.
- Only the start of the text gets a ▁, not every stretch between special tokens: the templates that Mistral publishes
  now write the space themselves ("<s> [INST] Hello [/INST] Hi</s>" for the first generation, "<s>[INST] Hello[/INST]
  Hi</s>" for later ones), and so the ids become those of mistral-common.
- User-defined pieces are cut out of the text, whole, before anything is joined. As added tokens they would lose the ▁
  in front of one that starts a text. So a Split isolates them and `ignore_merges` takes them as they are; a second
  Split keeps it from taking the spelling of a control or byte piece that stands between two of them.
- Decoding is the same for all ids that come from a text. For others it may not be: the unknown piece (a mark there,
  nothing here), a run of byte pieces that is no UTF-8, the byte of a space in front.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from quantkit.checkpoint.header import quote
from quantkit.errors import SourceError
from quantkit.tokenization.merges import joined, last_pair
from quantkit.tokenization.parts import added_token, bos_template, isolate
from quantkit.tokenization.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    MODEL_TYPES,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)

SPACE = "▁"
HINT = (
    "keep the file beside the weights and load it with sentencepiece; its text cannot be split the same way elsewhere"
)


def tokenizer_json(model: SentencePieceModel, *, where: str) -> dict[str, Any]:
    """The content of tokenizer.json. SourceError if the ids or the text would differ from SentencePiece's."""
    _check(model, where)
    user_defined = model.texts(USER_DEFINED)
    order = {p.text: -p.score for p in model.pieces if p.kind == NORMAL}
    normalizer, prefix = _spaces(model)
    pre_tokenizers = prefix + (_isolate(model, order) if user_defined else [])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, p.text) for i, p in enumerate(model.pieces) if p.kind in (UNKNOWN, CONTROL)],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None,
        "post_processor": None if model.bos_id is None else bos_template(model.pieces[model.bos_id].text, model.bos_id),
        "decoder": _decoder(model),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.unk_id].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": bool(user_defined),
            "vocab": {p.text: i for i, p in enumerate(model.pieces)},
            "merges": _merges(model, order, where),
        },
    }


def _check(model: SentencePieceModel, where: str) -> None:
    """SourceError on what tokenizer.json cannot say."""

    def refuse(what: str) -> SourceError:
        return SourceError(what, where=where, hint=HINT)

    if model.model_type != BPE:
        raise refuse(f"this is a {MODEL_TYPES[model.model_type]} tokenizer; only BPE can be converted exactly")
    if not model.byte_fallback:
        raise refuse("the tokenizer does not fall back to bytes: it spells an unknown character as no other can")
    if model.charsmap or model.output_charsmap:
        raise refuse(f"the tokenizer rewrites characters (normalizer {quote(model.normalizer or 'of its own')})")
    if model.whitespace_as_suffix or not model.escape_whitespaces:
        raise refuse("the tokenizer keeps spaces at the end of words, or does not mark them")
    if unused := model.texts(UNUSED):
        raise refuse(f"the tokenizer joins through pieces that it never gives, like {quote(unused[0])}")
    for text in model.texts(USER_DEFINED):
        if SPACE in text or " " in text or model.remove_extra_whitespaces:
            raise refuse(f"the user-defined piece {quote(text)} takes part in the handling of spaces")
    normal = dict.fromkeys(model.texts(NORMAL))
    for text in normal:
        if lonely := next((c for c in text if c not in normal), None):
            raise refuse(f"the piece {quote(text)} holds {quote(lonely)}, which is no piece itself")
        if model.remove_extra_whitespaces and text.startswith(SPACE + SPACE):
            raise refuse(f"the tokenizer drops spaces, but has the piece {quote(text)}")


def _merges(model: SentencePieceModel, order: dict[str, float], where: str) -> list[list[str]]:
    """Pairs, the best first. SourceError where pieces of one score leave more than one order open."""
    found = []
    unreachable = ""
    by_score = defaultdict(list)
    for place, piece in enumerate(model.pieces):
        if piece.kind != NORMAL or len(piece.text) == 1:
            continue
        if pair := last_pair(piece.text, order):
            found.append((-piece.score, -len(pair[0]), -len(pair[1]), place, *pair))
            by_score[piece.score].append(piece.text)
        else:
            unreachable = piece.text
    if unreachable and model.texts(USER_DEFINED):  # `ignore_merges` would give it for a text that is just this
        raise SourceError(f"no joins lead to the piece {quote(unreachable)}", where=where, hint=HINT)
    for texts in by_score.values():
        if len(texts) > 1 and len(set("".join(texts))) > 1:
            raise SourceError(
                f"the pieces {quote(texts[0])} and {quote(texts[1])} have the same score", where=where, hint=HINT
            )
    return [[left, right] for *_, left, right in sorted(found)]


def _spaces(model: SentencePieceModel) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The normalizer that turns spaces into ▁, and what puts the first ▁ there where it cannot."""
    to_marks = _replace({"String": " "}, SPACE)
    if model.remove_extra_whitespaces:
        # In SentencePiece's order; in the end a ▁ that stood in the text goes too. \A and \z: ^ and $ are for lines.
        steps = [_replace({"Regex": r"\A +"}, ""), _replace({"Regex": " {2,}"}, " ")]
        steps += [{"type": "Prepend", "prepend": SPACE}] if model.add_dummy_prefix else []
        return {"type": "Sequence", "normalizers": [*steps, to_marks, _replace({"Regex": rf"{SPACE}+\z"}, "")]}, []
    # Metaspace can tell the start of the text, but skips what starts with its mark. No space is left here, so with a
    # space for a mark it always adds one, and the second turns that into ▁.
    return to_marks, [_metaspace(" ", "first"), _metaspace(SPACE, "never")] if model.add_dummy_prefix else []


def _isolate(model: SentencePieceModel, order: dict[str, float]) -> list[dict[str, Any]]:
    """Cuts that leave a user-defined piece alone, and nothing else that spells a piece no joins lead to: such a text is
    cut once, at a place where its joins leave a cut anyway."""
    longest_first = sorted(model.texts(USER_DEFINED), key=lambda t: (-len(t), t))
    by_start = defaultdict(list)
    for kind in (UNKNOWN, CONTROL, BYTE):
        for text in model.texts(kind):
            if cuts := joined(text, order):
                by_start[text[: cuts[0]]].append(text[cuts[0] :])
    starts = [rf"{_escape(start)}(?=(?:{'|'.join(map(_escape, ends))})\z)" for start, ends in by_start.items()]
    return [isolate("|".join(map(_escape, longest_first))), isolate(rf"\A(?:{'|'.join(starts)})")]


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _metaspace(mark: str, scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": False}


def _escape(text: str) -> str:
    """For a regular expression: a backslash before ASCII punctuation and nothing else, which all dialects agree on."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def _decoder(model: SentencePieceModel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.remove_extra_whitespaces:  # any number in front; there are no more than this
        steps.append({"type": "Strip", "content": " ", "start": 1_000_000_000, "stop": 0})
    elif model.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
