"""The settings of a saved adapter, and those that cannot be imported."""

from collections.abc import Mapping
from typing import Any

from packaging.version import Version

from hf_peft_ext.validation.checks import check

# architecture -> settings that are supported only with their default value
DEFAULT_ONLY: dict[str | None, dict[str, Any]] = {
    None: {"shared_W_phm": False, "factorized_phm_W": True, "adapter_residual_before_ln": False},
    "lora": {},
    "prefix_tuning": {"shared_gating": True},
    "prompt_tuning": {},
    "reft": {"output_reft": True},
}
# architecture -> why it cannot be imported
REFUSED_METHODS = {
    "mtl_lora": "peft has no matrices of single tasks in a LoRA",
}

Settings = Mapping[str, Any]  # of one method, as saved by the library


def methods(saved: dict[str, Any]) -> list[Settings]:
    """The methods of a checkpoint: the members of a union, or its only one.

    Raises:
        ValueError: a setting is not supported.
    """
    config = dict(saved["config"])
    library, _, version = (saved.get("version") or "").partition(".")
    if library == "adapters" and Version(version) < Version("1.1.0") and config.get("architecture") == "lora":
        config["alpha"] = config["r"]  # these versions ignored alpha and used r
    members: list[Settings] = config["configs"] if config.get("architecture") == "union" else [config]
    for method in members:
        kind = method.get("architecture")
        check(
            "architecture", kind, kind not in REFUSED_METHODS, f"cannot be imported: {REFUSED_METHODS.get(str(kind))}"
        )
        rule = "must be None (a bottleneck), 'lora', 'prefix_tuning', 'prompt_tuning', 'reft' or 'union'"
        check("architecture", kind, kind in DEFAULT_ONLY, rule)
        for key, value in DEFAULT_ONLY[kind].items():
            check(key, method.get(key, value), method.get(key, value) == value, f"must be {value!r}")
        inverse = method.get("inv_adapter")
        check("inv_adapter", inverse, inverse in (None, "nice"), "must be None or 'nice'; the library's others fail")
        check("architecture", kind, kind != "prompt_tuning" or len(members) == 1, "must not be in a union")
        if is_ia3(method):
            check("composition_mode", "scale", len(members) == 1, "must be 'add' in a union")
            check("use_gating", True, not method.get("use_gating"), "must be False for (IA)^3")
    return members


def is_ia3(method: Settings) -> bool:
    """Whether a LoRA of the library is (IA)^3: it multiplies outputs instead of adding to them."""
    return method.get("composition_mode") == "scale"
