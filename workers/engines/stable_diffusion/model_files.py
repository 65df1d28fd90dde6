"""A model's files: found in a folder or on the hub, and checked before any weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import EngineUnavailable

COMPONENT_CLASSES: Mapping[str, frozenset[tuple[str, str]]] = {
    "vae": frozenset({("diffusers", "AutoencoderKL")}),
    "unet": frozenset({("diffusers", "UNet2DConditionModel")}),
    "text_encoder": frozenset({("transformers", "CLIPTextModel")}),
    "tokenizer": frozenset(
        {("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")}
    ),
}
WEIGHT_FILES = {
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
}
LFS_POINTER_HEADER = b"version https://git-lfs"
HASHED_SUFFIXES = frozenset({".json", ".safetensors", ".txt"})
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
CONFIG_PATTERNS = (
    "*.py",  # fetched so that custom code is detected and refused; it is never run
    "model_index.json",
    *(f"{component}/config.json" for component in WEIGHT_FILES),
    "scheduler/scheduler_config.json",
    "tokenizer/*",
)
FULL_PATTERNS = tuple(
    f"{component}/{stem}*.safetensors*" for component, stem in WEIGHT_FILES.items()
)
OTHER_VARIANT_PATTERNS = ("*.fp16*", "*non_ema*", "*.bf16*")
FP16_PATTERNS = tuple(
    f"{component}/{stem}*.fp16*.safetensors*" for component, stem in WEIGHT_FILES.items()
)
UNSUPPORTED_UNET_CONFIG = (
    "time_cond_proj_dim",
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
)


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A pipeline folder that passed all checks.

    revision: the hub's commit, or ``sha256:`` and 16 digits over the folder's content.
    variant: ``fp16`` if the folder has no other weights.
    """

    path: Path
    revision: str
    variant: str | None


def find_model(model: str, revision: str | None) -> ModelFiles:
    """Return the folder of that name, else the hub's model of that id, downloaded if not cached.

    Raises EngineUnavailable with one line that names the remedy.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise EngineUnavailable(f"{model} is a folder; it has no revision {revision!r}")
        check_pipeline(folder)
        variant = find_variant(folder)
        return ModelFiles(path=folder, revision=hash_content(folder), variant=variant)
    if not is_hub_id(model):
        raise EngineUnavailable(f"{model}: no such folder; name one that holds model_index.json")
    return _find_on_hub(model, revision)


def is_hub_id(model: str) -> bool:
    """Whether the text is ``owner/name`` and not a path such as ``./x``, ``~/x`` or ``/x``."""
    owner, _, name = model.partition("/")
    return bool(owner and name) and owner not in {".", "..", "~"} and "/" not in name


def _find_on_hub(model: str, revision: str | None) -> ModelFiles:
    """Download the plain weights; the fp16 ones only if there are no others."""
    path = _fetch(
        model, revision, (*CONFIG_PATTERNS, *FULL_PATTERNS), ignored=OTHER_VARIANT_PATTERNS
    )
    check_pipeline(path)
    # A second download only if needed: each variant has gigabytes.
    if _missing_weights(path, variant=None):
        path = _fetch(model, revision, (*CONFIG_PATTERNS, *FP16_PATTERNS), ignored=("*non_ema*",))
    # The hub's cache names each snapshot's folder after its commit.
    return ModelFiles(path=path, revision=path.name, variant=find_variant(path))


def _fetch(
    model: str, revision: str | None, patterns: Iterable[str], *, ignored: Iterable[str]
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored)
        )
    except Exception as error:  # huggingface_hub has no common error class
        raise EngineUnavailable(_hub_error_message(model, revision, error)) from error
    return Path(folder)


def _hub_error_message(model: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return f"{model}: the hub wants its licence accepted; accept it there and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return f"{model}: neither a folder here nor a model on the hub; check the id or the path"
    if isinstance(error, RevisionNotFoundError):
        return f"{model}: the hub has no revision {revision!r}; check what follows the '@'"
    return (
        f"{model}: not in the hub's cache, and the hub does not answer ({type(error).__name__}); "
        "connect once, or use diffusers:FOLDER with a local copy"
    )


def check_pipeline(folder: Path) -> None:
    """Raises EngineUnavailable unless it is an SD inpainting pipeline without custom code."""
    if not (folder / "model_index.json").is_file():
        raise EngineUnavailable(
            f"{folder}: no model_index.json; name the folder that save_pretrained wrote"
        )
    _check_custom_code(folder)
    _check_classes(folder)
    _check_shapes(folder)
    if not any((folder / "tokenizer" / name).is_file() for name in TOKENIZER_FILES):
        raise EngineUnavailable(f"{folder}: no tokenizer; fetch the model again")
    _check_lfs_pointers(folder)


def _check_lfs_pointers(folder: Path) -> None:
    """A clone made without Git LFS has a short text file in place of each weights file."""
    for path in sorted(folder.glob("*/*.safetensors")):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER_HEADER)) == LFS_POINTER_HEADER:
                raise EngineUnavailable(
                    f"{path}: a Git LFS pointer, not the weights; run git lfs pull in {folder}"
                )


def _check_custom_code(folder: Path) -> None:
    scripts = sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py"))
    if scripts:
        raise EngineUnavailable(
            f"{folder}: custom pipeline code ({scripts[0].relative_to(folder)}) is never run; "
            "use a model without it"
        )


def _check_classes(folder: Path) -> None:
    index = read_json(folder / "model_index.json")
    for component, allowed in COMPONENT_CLASSES.items():
        actual = index.get(component)
        if not isinstance(actual, list) or tuple(actual) not in allowed:
            expected = min(name for _, name in allowed)
            raise EngineUnavailable(
                f"{folder}: {component} is {actual}, not {expected}; use an SD2 model"
            )


def _check_shapes(folder: Path) -> None:
    unet, vae, text = (
        read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder")
    )
    _check_input_channels(folder, unet, vae)
    if unet.get("cross_attention_dim") != text.get("hidden_size"):
        raise EngineUnavailable(
            f"{folder}: the text encoder's embeddings have {text.get('hidden_size')} values and "
            f"the UNet reads {unet.get('cross_attention_dim')}; they belong to different models"
        )
    scale = vae.get("scaling_factor", 0.18215)
    if not isinstance(scale, int | float) or scale <= 0:
        raise EngineUnavailable(f"{folder}: the VAE's scaling_factor is {scale}; use an SD2 model")
    unsupported = [name for name in UNSUPPORTED_UNET_CONFIG if unet.get(name) is not None]
    if unsupported:
        raise EngineUnavailable(
            f"{folder}: the UNet needs {unsupported[0]}; use an SD2 inpainting model"
        )


def _check_input_channels(folder: Path, unet: dict[str, Any], vae: dict[str, Any]) -> None:
    # diffusers leaves defaults out of config.json, so the same defaults are given here.
    channels, latent_channels = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    expected = 2 * latent_channels + 1  # noisy latents, mask, masked image's latents
    if channels != expected:
        raise EngineUnavailable(
            f"{folder}: the UNet has {channels} input channels, not {expected}; "
            "use an inpainting model"
        )


def find_variant(folder: Path) -> str | None:
    """Return None for the plain weights, ``fp16`` if only those exist.

    Raises EngineUnavailable if a component has no safetensors.
    """
    missing = _missing_weights(folder, variant=None)
    if not missing:
        return None
    if not _missing_weights(folder, variant="fp16"):
        return "fp16"
    component = folder / missing[0]
    if any(component.glob("*.bin")) or any(component.glob("*.ckpt")):
        raise EngineUnavailable(
            f"{component}: only pickled weights, which can run code; convert them to safetensors "
            "(load where you trust them, then save_pretrained(..., safe_serialization=True))"
        )
    raise EngineUnavailable(f"{component}: no .safetensors weights; fetch the model again")


def _missing_weights(folder: Path, *, variant: str | None) -> list[str]:
    """Components without weights of this variant, in one file or sharded with an index."""
    infix = f".{variant}" if variant else ""
    return [
        component
        for component, stem in WEIGHT_FILES.items()
        if not (folder / component / f"{stem}{infix}.safetensors").is_file()
        and not (folder / component / f"{stem}.safetensors.index{infix}.json").is_file()
    ]


def hash_content(folder: Path) -> str:
    """Return ``sha256:`` and 16 digits over the names and bytes of every file that is loaded."""
    digest = hashlib.sha256()
    # Other files, a README or a preview, may change without changing a pixel.
    loaded = (path for path in folder.glob("**/*") if path.suffix in HASHED_SUFFIXES)
    for path in sorted(loaded):
        with path.open("rb") as file:
            file_hash = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {file_hash}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def read_json(path: Path) -> dict[str, Any]:
    """Raises EngineUnavailable if the file is missing or not a JSON object."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise EngineUnavailable(f"{path}: {reason}; fetch the model again") from error
    if not isinstance(values, dict):
        raise EngineUnavailable(f"{path}: not a JSON object; fetch the model again")
    return values
