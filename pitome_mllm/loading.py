"""`load`: a model with its processor, by the name of the embedded model, of a folder, or of a checkpoint on the hub."""

from __future__ import annotations

import importlib.util
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from .costs.memory import BITS
from .errors import UserError, missing_package
from .families import FAMILY_OF_CONFIG, LLAVA_PACKAGE
from .families.encoders import ENCODER_OF_CONFIG
from .families.geometry import family_of, geometry
from .families.packed import PARTS
from .hooks import llava_package

TINY = Path(__file__).with_name("tiny")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class TokenizersBackend(transformers.PreTrainedTokenizerFast):
    """The embedded model's tokenizer, which warns once per process of words that it does not know.

    Its name is what save_pretrained writes, so that transformers can load what was saved.
    """

    purpose = "the embedded model answers one-word questions about drawn shapes and handwritten digits"
    examples = ("how many circles are there?", "is there a red star?", "what shape is in the top left?")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(*args, **kwargs)
        if any(self.unk_token_id in encoding.ids for encoding in found.encodings or ()):
            _warn_of_unknown_words()
        return found


@cache
def _warn_of_unknown_words() -> None:
    examples = " or ".join(map(repr, TokenizersBackend.examples))
    said = f"the question holds words that it does not know, so its answer means nothing; ask such as {examples}"
    warnings.warn(f"{TokenizersBackend.purpose}; {said}", stacklevel=4)


def load(
    name_or_path: str | Path,
    bits: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[Any, Any]:
    """Load a multimodal model in evaluation mode, and its processor.

    Parameters
    ----------
    name_or_path : str or Path
        "tiny" (the embedded model, needs no network), a folder written by ``save_pretrained``, or a checkpoint's name
        on the Hugging Face hub such as "llava-hf/llava-1.5-7b-hf".
    bits : int, optional
        4 or 8 loads the weights quantised with bitsandbytes (4 is nf4); None keeps them as they are.
    dtype : torch.dtype or str, optional
        "float32", "float16", "bfloat16" or the torch dtype. Default: float32 for "tiny", else the checkpoint's own.
        With ``bits`` it is the dtype of everything that is not quantised.
    device : torch.device or str, optional
        Such as "cpu", "cuda" or "cuda:1"; "auto" spreads the model over what there is. Default: the CPU, or the first
        GPU where ``bits`` is given and there is one.

    Raises
    ------
    ValueError
        No such folder or checkpoint, an unsupported family, a value out of range, a missing extra.
    """
    source = _source(name_or_path)
    architecture = _original_architecture(source)
    if architecture is not None and bits is not None:
        raise UserError(
            f"bits={bits} is not possible with a checkpoint of the original llava package here; load it quantised "
            "with that package's own load_pretrained_model, then attach"
        )
    if bits is not None and (isinstance(bits, bool) or bits not in BITS):
        raise UserError(f"bits={bits!r} is not possible; choose 4 or 8, or leave it out for unquantised weights")
    if bits is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise missing_package(f"bits={bits} needs bitsandbytes", "bnb")
    dtype = _dtype(dtype, tiny=name_or_path == "tiny")
    placement = _device_map(device, bits)
    if architecture is not None:
        return llava_package.load(source, architecture, dtype, placement)
    config = read_config(name_or_path)
    options: dict[str, Any] = {"dtype": dtype, "device_map": placement}
    if bits is not None:
        options["quantization_config"] = _quantisation(bits, dtype)
    model = _model(source, config, options)
    return model.eval(), _processor(source, config)


def load_processor(name_or_path: str) -> Any:
    """The processor alone; raises as `load`."""
    return _processor(_source(name_or_path), read_config(name_or_path))


def _dtype(dtype: torch.dtype | str | None, tiny: bool) -> torch.dtype | str:
    """What ``from_pretrained`` takes: a torch dtype, or "auto" for the checkpoint's own."""
    if dtype is None:
        return torch.float32 if tiny else "auto"
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise UserError(f"dtype={dtype!r} is not possible; choose one of {', '.join(DTYPES)}")
    return found


def _device_map(device: torch.device | str | None, bits: int | None) -> str | dict[str, torch.device]:
    """What ``from_pretrained`` takes as ``device_map``."""
    if device == "auto":
        return "auto"
    if device is None:
        device = "cuda" if bits is not None and torch.cuda.is_available() else "cpu"
    possible = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        possible.append("mps")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device={device!r} is not a device; possible here: {', '.join(possible)}, auto") from error
    index = f"{found.type}:{found.index or 0}"
    if found.type not in possible and index not in possible:
        raise UserError(f"device={str(device)!r} is not available; possible here: {', '.join(possible)}, auto")
    return {"": found}


def _source(name_or_path: str | Path) -> str:
    """The folder to read, or a name for the hub."""
    if not isinstance(name_or_path, (str, Path)):
        raise UserError(f"expected a model's name or folder, got {type(name_or_path).__name__}")
    if name_or_path == "tiny":
        if not (TINY / "config.json").is_file():
            raise UserError(f"the embedded model is missing from {TINY}; install pitome-mllm again")
        return str(TINY)
    if name_or_path == "":
        raise UserError("the model's name is empty; give 'tiny', a folder, or a hub name like 'owner/model'")
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"folder {str(path)!r} has no config.json; expected what save_pretrained() writes")
        return str(path)
    if path.exists():
        raise UserError(f"{str(path)!r} is a file; expected the folder that holds config.json and the weights")
    if isinstance(name_or_path, Path) or not _HUB_NAME.fullmatch(name_or_path):
        raise UserError(f"no folder {str(path)!r}; give 'tiny', an existing folder, or a hub name like 'owner/model'")
    return name_or_path


def _original_architecture(source: str) -> str | None:
    """The class of the original llava package that a checkpoint is of; None for any other checkpoint."""
    try:
        architectures = transformers.PretrainedConfig.get_config_dict(source)[0].get("architectures") or ()
    except (OSError, ValueError):  # read_config says what is wrong with it
        return None
    return next((name for name in architectures if name in LLAVA_PACKAGE), None)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def read_config(name_or_path: str | Path) -> Any:
    """The configuration of a model that `load` can load; from the hub, this small file is all that is fetched.

    Raises
    ------
    ValueError
        No such folder or checkpoint, a configuration that cannot be read, or an unsupported family or vision tower.
    """
    source = _source(name_or_path)
    if _original_architecture(source) is not None:
        raise UserError(
            f"{source!r} is a checkpoint of the original llava package, whose processor has no placeholders for "
            "pictures, so command line and chat do not take it; in Python, pitome_mllm.load does, and then attach"
        )
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except OSError as error:
        if Path(source).is_dir():
            raise UserError(
                f"cannot read config.json in folder {source!r} ({_first_line(error)}); "
                f"copy it again, or write the folder anew with save_pretrained()"
            ) from error
        raise UserError(
            f"cannot load {source!r}: it is neither a folder here nor a checkpoint that the Hugging Face hub gave "
            f"({_first_line(error)}); give 'tiny', an existing folder, or a hub name like 'owner/model'"
        ) from error
    except StrictDataclassError as error:
        raise UserError(
            f"config.json of {source!r} holds a value that is not possible ({' '.join(str(error).split())}); correct it"
        ) from error
    except ValueError as error:
        supported = ", ".join(sorted(FAMILY_OF_CONFIG))
        raise UserError(f"unsupported family in {source!r} ({_first_line(error)}); supported: {supported}") from error
    if _may_be_tried(config):
        return config
    if any(name not in FAMILY_OF_CONFIG.values() for name in config.architectures or ()):
        raise UserError(
            f"unsupported family {', '.join(config.architectures)} in {source!r}; supported: "
            f"{', '.join(sorted(FAMILY_OF_CONFIG.values()))}, in the layout of the hub's llava-hf checkpoints; a "
            "new family is a row in pitome_mllm.families"
        )
    family_of(config), geometry(config)  # raise for families and towers that cannot be merged in
    return config


def _auto() -> Any:
    """The class of a model by its configuration's; asked late: that of the llava package has none."""
    return transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _may_be_tried(config: Any) -> bool:
    """Whether a model of a family without a row has what `attach` needs to try it."""
    known = config.model_type in FAMILY_OF_CONFIG or config.model_type in ENCODER_OF_CONFIG
    return not known and type(config) in _auto() and all(hasattr(config, part) for part in PARTS)


def _quantisation(bits: int, dtype: torch.dtype | str) -> Any:
    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _model(source: str, config: Any, options: dict[str, Any]) -> Any:
    """The model with all its weights."""
    name = FAMILY_OF_CONFIG.get(config.model_type)
    family: Any = getattr(transformers, name) if name else _auto()[type(config)]
    # Weights of another shape are ignored at first so that the report names them; then they are refused here.
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True, **options}
    try:
        model, report = family.from_pretrained(source, config=config, **options)
    except OSError as error:
        raise UserError(f"cannot load the weights of {source!r}: {_first_line(error)}") from error
    except SafetensorError as error:
        raise UserError(
            f"cannot read the weights {_broken_file(source)!r}: the file is damaged or was cut short "
            f"({_first_line(error)}); copy or download it again"
        ) from error
    if report["mismatched_keys"]:  # they would be random numbers
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"the weights in {source!r} do not fit its config.json: {name} has the shape {tuple(found)}, the "
            f"configuration says {tuple(expected)}; take config.json and weights from the same checkpoint"
        )
    if report["missing_keys"]:  # they would be random numbers
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{source!r} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; "
            f"expected the layout that save_pretrained() writes"
        )
    return model


def _broken_file(source: str) -> str:
    """The first file of weights in a folder that cannot be opened; the source itself if it is a name on the hub."""
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return source


def read_processor(kind: Any, source: str) -> Any:
    """The processor of this ``kind``, one of transformers' Auto classes; ValueError where there is none."""
    try:
        return kind.from_pretrained(source)
    except (ImportError, OSError, ValueError) as error:
        found = f"cannot load the processor of {source!r} ({_first_line(error).partition('. Check out')[0]})"
        needed = "expected tokenizer and image processor files beside config.json"
        raise UserError(f"{found}; {'install torchvision' if isinstance(error, ImportError) else needed}") from error


def _processor(source: str, config: Any) -> Any:
    """The processor of a model; older checkpoints leave out what it needs to know of the tower."""
    processor = read_processor(transformers.AutoProcessor, source)
    if source == str(TINY):
        processor.tokenizer.__class__ = TokenizersBackend
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
        processor.num_additional_image_tokens = geometry(config).class_tokens
    if getattr(processor, "vision_feature_select_strategy", "") is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    return processor
