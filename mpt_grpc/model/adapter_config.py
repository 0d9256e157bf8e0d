"""What an adapter's `adapter_config.json` says about merging: which modules are adapted, and the factor of each update.

The format is PEFT's `LoraConfig`. As in config.json, a field is judged by what its value does: what cannot change the
merged weights is ignored, and whatever cannot be merged is refused, all at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpt_grpc.errors import ConfigError
from mpt_grpc.model.fields import Fields, LimitedField, is_number, one_of
from mpt_grpc.model_files import read_json

EMBEDDINGS = ("wte", "wpe")
ADAPTABLE = ("Wqkv", "out_proj", "up_proj", "gate_proj", "down_proj", "lm_head", *EMBEDDINGS)
"""The last components of the names of the modules that can be adapted."""

_READ = frozenset(
    "bias exclude_modules layers_to_transform lora_alpha modules_to_save peft_type r rank_pattern alpha_pattern"
    " target_modules use_rslora".split()
)
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_LIMITED = (
    one_of("bias", ("none", "all", "lora_only", None), "another choice of biases"),
    one_of("init_lora_weights", _INITIALIZATIONS, "an initialization that also changes the model's own weights"),
    one_of("use_dora", (False, None), "DoRA"),
    one_of("lora_bias", (False, None), "updates with a bias"),
    one_of("ensure_weight_tying", (False, None), "an adapter of tied layers"),
    *(
        LimitedField(name, "null or empty", needs, lambda value: not value)
        for name, needs in {
            "layer_replication": "repeated layers",
            "target_parameters": "adapters of other parameters than the weights of layers",
            "trainable_token_indices": "replaced rows of the embedding",
            "alora_invocation_tokens": "weights that depend on the prompt",
            "use_qalora": "QA-LoRA",
            "use_bdlora": "BD-LoRA",
            "arrow_config": "a choice between several adapters for each token",
            "kasa_config": "KaSA",
            "monteclora_config": "MonteCLoRA",
        }.items()
    ),
)
_IGNORED = frozenset(
    # Metadata, training, initialization, and layouts that MPT's layers do not have.
    "auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out inference_mode layers_pattern"
    " loftq_config lora_dropout lora_ga_config megatron_config megatron_core merge_weights peft_version"
    " qalora_group_size revision runtime_config task_type velora_config".split()
)
_REMEDY = "where PEFT can merge it, serve the model that merge_and_unload returns"


@dataclass(frozen=True)
class AdapterConfig:
    """Which modules of a model an adapter changes, and how."""

    rank: int
    alpha: float
    use_rslora: bool
    """Whether an update is scaled by alpha / sqrt(rank) instead of alpha / rank."""
    rank_pattern: Mapping[str, float]
    """The ranks of the modules that a regular expression matches, instead of `rank`."""
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str
    """Modules by the ends of their names, or a regular expression that matches whole names."""
    exclude_modules: tuple[str, ...] | str
    layers: tuple[int, ...]
    """The layers in which `target_modules`, if they are ends of names, are adapted; empty for all."""
    bias: str
    """The biases that are replaced: 'none', 'all', or with 'lora_only' those of the adapted modules."""
    modules_to_save: tuple[str, ...]
    """The modules whose parameters are replaced, by the ends of their names."""

    @classmethod
    def from_file(cls, path: Path) -> AdapterConfig:
        """Reads `adapter_config.json`. Raises ModelError, or ConfigError with every field that is not supported."""
        raw = read_json(path)
        if raw is None:
            raise ConfigError(f"--adapter {path.parent}: no {path.name}; expected a folder as PEFT saves it")
        if raw.get("peft_type") != "LORA":
            why = f"peft_type: {raw.get('peft_type')!r} is not supported; only 'LORA' is"
            raise ConfigError(f"{path}: {why}; {_REMEDY}")
        fields = Fields(raw)
        fields.check_limited(_LIMITED)
        alpha = fields.number("lora_alpha")
        config = cls(
            rank=fields.size("r", 8),
            alpha=8.0 if alpha is None else alpha,
            use_rslora=fields.boolean("use_rslora", False),
            rank_pattern=_pattern(fields, "rank_pattern", least=1),
            alpha_pattern=_pattern(fields, "alpha_pattern", least=0),
            target_modules=_modules(fields, "target_modules", ("Wqkv",)),
            exclude_modules=_modules(fields, "exclude_modules"),
            layers=_layers(fields),
            bias=str(fields.get("bias")).lower(),
            modules_to_save=_names(fields, "modules_to_save"),
        )
        fields.check_unknown(_READ, _LIMITED, _IGNORED.__contains__)
        if fields.obstacles:
            raise ConfigError(f"{path}: {'; '.join(fields.obstacles)}; {_REMEDY}")
        return config

    def rank_of(self, module: str) -> float:
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the factor of the product of a module's two matrices."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def adapts(self, module: str) -> bool:
        """Whether PEFT adds an update to the weight of a module, named as in the model."""
        if module.rpartition(".")[2] not in ADAPTABLE or self.replaces(module):
            return False
        if _selects(self.exclude_modules, module) or not _selects(self.target_modules, module):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules or not self.layers:
            return True
        layer = re.search(r"\.blocks\.(\d+)\.", module)
        return layer is not None and int(layer[1]) in self.layers

    def replaces(self, name: str) -> bool:
        """Whether PEFT saves a module or a parameter of the model as a whole."""
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and (self.bias == "all" or (self.bias == "lora_only" and self.adapts(module))):
            return True
        return any(f".{module}." in f".{name}." for module in self.modules_to_save)


def _matching(pattern: Mapping[str, float], module: str, default: float) -> float:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _selects(modules: tuple[str, ...] | str, module: str) -> bool:
    if modules == "all-linear":
        return module.rpartition(".")[2] not in ("lm_head", *EMBEDDINGS)
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in modules)


def _pattern(fields: Fields, name: str, *, least: int) -> Mapping[str, float]:
    values = fields.get(name) or {}
    if not isinstance(values, Mapping) or not all(_is_regex(key) for key in values):
        fields.refuse(name, values, "expected an object whose keys are regular expressions")
        return {}
    if not all(is_number(value, least) for value in values.values()):
        fields.refuse(name, values, f"expected numbers from {least}")
        return {}
    return values


def _modules(fields: Fields, name: str, default: tuple[str, ...] = ()) -> tuple[str, ...] | str:
    value = fields.get(name)
    if not isinstance(value, str):
        return default if value is None else _names(fields, name)
    if not _is_regex(value):
        fields.refuse(name, value, "expected a list of names or a regular expression")
    return value


def _names(fields: Fields, name: str) -> tuple[str, ...]:
    values = fields.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        fields.refuse(name, values, "expected a list of names of modules")
        return ()
    return tuple(values)


def _layers(fields: Fields) -> tuple[int, ...]:
    value = fields.get("layers_to_transform")
    layers = [] if value is None else [value] if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        fields.refuse("layers_to_transform", value, "expected a number or a list of numbers of layers")
        return ()
    return tuple(layers)


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
