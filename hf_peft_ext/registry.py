"""Registers the methods of this package with peft. The only file that touches peft's tables and classes.

peft has no entry point for new methods, and `register_peft_method` refuses names outside the `PeftType` enum. So the
names become real members of that enum: a plain string in peft's tables breaks transformers' loading and peft's status
report, which read `.value`.
"""

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType, register_peft_method

REGISTERED: set[PeftType] = set()
_changes: list[Callable[[], object]] = []  # changes of peft that wait for the first use of this package
_lock = threading.RLock()
_extended = threading.Event()


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> PeftType:
    """Make `name` a PEFT type. Doing it twice is harmless.

    Args:
        name: the type in lower case, such as "unipelt".

    Raises:
        RuntimeError: another package has registered the name, or this peft no longer takes new members.
    """
    peft_type = add_member(name.upper())
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    elif registered.__qualname__ != config_cls.__qualname__ or registered.__module__ != config_cls.__module__:
        raise RuntimeError(f"`name` (={name!r}) is already a PEFT type, registered by {registered.__module__}.")
    REGISTERED.add(peft_type)
    return peft_type


def replace_tuner(peft_type: PeftType, model_cls: type[BaseTuner]) -> None:
    """Let a class derived from peft's tuner of a type take its place. Doing it twice is harmless.

    Raises:
        RuntimeError: another package has put its own class there.
    """
    present = PEFT_TYPE_TO_TUNER_MAPPING[peft_type]
    same = (present.__module__, present.__qualname__) == (model_cls.__module__, model_cls.__qualname__)
    if present not in model_cls.__mro__ and not same:
        raise RuntimeError(f"`peft_type` (={peft_type.value!r}) has a tuner of another package, {present.__module__}.")
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls


def on_first_use(change: Callable[[], object]) -> None:
    """Call `change` at the first use of this package (see `extend_peft`), or now if it has been used already."""
    _changes.append(change)
    if _extended.is_set():
        extend_peft()


def extend_peft() -> None:
    """Replace peft's tuner of (IA)^3, and extend `PeftModel`'s loading, saving, cards and pushes.

    `import hf_peft_ext` alone only registers its types. The first config of this package, also one that stock peft
    reads, the first `load_adapter` and the first trainer call this function. A program that uses none of them, but
    mixes stock (IA)^3 adapters in one batch (`adapter_names`), calls it before it builds the model. Further calls do
    nothing.

    Raises:
        RuntimeError: another package has replaced peft's tuner of (IA)^3.
    """
    with _lock:
        while _changes:
            _changes[0]()
            del _changes[0]
        _extended.set()


def add_member(value: str) -> PeftType:
    """The member `value` of peft's `PeftType`, added if it is not there."""
    if value not in PeftType.__members__:
        member: Any = str.__new__(PeftType, value)
        member._name_ = member._value_ = value
        member._sort_order_ = len(PeftType.__members__)
        member.__objclass__ = PeftType
        try:
            PeftType._value2member_map_[value] = member  # first: where it is read-only, nothing is half done
            PeftType._member_map_[value] = member
            PeftType._member_names_.append(value)
            type.__setattr__(PeftType, value, member)
        except (AttributeError, TypeError) as error:
            raise closed(value) from error
    if PeftType._value2member_map_.get(value) is not PeftType.__members__.get(value):
        raise closed(value)
    return PeftType[value]


def closed(value: str) -> RuntimeError:
    """The error for a peft whose PeftType takes no new members."""
    return RuntimeError(
        f"`name` (={value.lower()!r}) cannot become a PeftType in this peft; see the supported versions."
    )


def extend(ours: Callable[..., Any]) -> Callable[..., Any]:
    """Have `PeftModel` use `ours` for adapters of this package, in place of its method of the same name.

    `ours` is called with peft's own method, the model and the arguments. Models with other adapters keep that method.
    """
    stock = getattr(PeftModel, ours.__name__)
    stock = getattr(stock, "stock", stock)  # of a module that is loaded again

    @functools.wraps(stock)
    def method(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if self.peft_type in REGISTERED:
            return ours(functools.partial(stock, self), self, *args, **kwargs)
        return stock(self, *args, **kwargs)

    vars(method)["stock"] = stock
    setattr(PeftModel, ours.__name__, method)
    return ours


def extend_on_first_use(ours: Callable[..., Any]) -> Callable[..., Any]:
    """As `extend`, at the first use of this package (see `extend_peft`)."""
    on_first_use(functools.partial(extend, ours))
    return ours


def extend_function(ours: Callable[..., Any]) -> Callable[..., Any]:
    """Have peft use `ours` in place of its function of the same name, in every module of peft that has it.

    `ours` is called with peft's own function and the arguments. This is done when this package is imported: later, a
    program may have imported peft's function by name already.
    """
    modules = [module for name, module in list(sys.modules.items()) if name == "peft" or name.startswith("peft.")]
    stock = getattr(sys.modules["peft"], ours.__name__)
    stock = getattr(stock, "stock", stock)  # of a module that is loaded again

    @functools.wraps(stock)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(stock, *args, **kwargs)

    vars(function)["stock"] = stock
    for module in modules:
        present = vars(module).get(ours.__name__)
        if present is stock or getattr(present, "stock", None) is stock:
            setattr(module, ours.__name__, function)
    return ours
