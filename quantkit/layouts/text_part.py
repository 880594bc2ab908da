"""The language model of a Hugging Face vision model (Mistral 3, Pixtral, LLaVA), as a checkpoint of its own.

Names are those of transformers 4 (`language_model.model.…`) and 5 (`model.language_model.…`).
"""

from __future__ import annotations

from dataclasses import replace

from quantkit.checkpoint.header import quote
from quantkit.errors import SourceError
from quantkit.layouts.base import Checkpoint
from quantkit.layouts.hf import CONFIG
from quantkit.layouts.mistral_hf_config import CLASSES
from quantkit.layouts.mistral_names import HEAD

_INNER = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_VISION = ("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector.")


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without its vision part. SourceError if it has none, or of a kind that is not known here."""
    where = str(checkpoint.folder / CONFIG)
    inner = checkpoint.config.get("text_config")
    if not isinstance(inner, dict):
        raise SourceError("the model has no vision part", where=where, hint="leave --text-only out")
    model_type = inner.get("model_type")
    if not isinstance(model_type, str) or model_type not in CLASSES:
        raise SourceError(
            f"the text part is of model_type {quote(model_type)}", where=where,
            hint=f"--text-only knows {', '.join(CLASSES)}",
        )  # fmt: skip
    renamed: dict[str, str] = {}
    dropped: list[str] = []
    for name in (*checkpoint.tensors, *checkpoint.absent):
        text = next((new + name[len(old) :] for old, new in _INNER if name.startswith(old)), None)
        if text is None and name == HEAD:
            text = name
        if text is not None:
            renamed[name] = text
        elif name.startswith(_VISION):
            dropped.append(name)
        else:
            raise SourceError(
                f"tensor {quote(name)} belongs neither to the text part nor to the vision part",
                where=str(checkpoint.folder), hint="this is a model that --text-only does not know",
            )  # fmt: skip
    # Of the two configurations either may say whether the head is tied, and their defaults differ: the weights decide.
    outer = {key: checkpoint.config[key] for key in ("dtype", "torch_dtype") if key in checkpoint.config}
    config = {
        **outer, **inner, "architectures": [CLASSES[model_type][0]], "tie_word_embeddings": HEAD not in renamed.values()
    }  # fmt: skip
    return replace(
        checkpoint,
        config=config,
        tensors={renamed[n]: replace(t, name=renamed[n]) for n, t in checkpoint.tensors.items() if n in renamed},
        absent={renamed[n]: file for n, file in checkpoint.absent.items() if n in renamed},
        index_total=None,
        dropped=tuple(dropped),
        notes=(*checkpoint.notes, f"the vision part is left out: {len(dropped)} tensors"),
    )
