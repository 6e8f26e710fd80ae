"""Every method by the name that a configuration gives it."""

from __future__ import annotations

from lsg_jax.methods.damro import Damro
from lsg_jax.methods.diysink import DiySink
from lsg_jax.methods.eah import Eah
from lsg_jax.methods.fixed import Fixed
from lsg_jax.methods.full import Full
from lsg_jax.methods.gated_output import GatedOutput
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.gift import Gift
from lsg_jax.methods.lora import Lora
from lsg_jax.methods.method import Method
from lsg_jax.methods.pai import Pai
from lsg_jax.methods.registers import RegisterTokens
from lsg_jax.methods.sink_front import SinkFront
from lsg_jax.methods.vaf import Vaf
from lsg_jax.methods.var import Var

METHODS: dict[str, type[Method]] = {
    "base": Method,
    "lsg": Gates,
    "var": Var,
    "pai": Pai,
    "vaf": Vaf,
    "eah": Eah,
    "damro": Damro,
    "gift": Gift,
    "sink_front": SinkFront,
    "diysink": DiySink,
    "registers": RegisterTokens,
    "lora": Lora,
    "gated_output": GatedOutput,
    "fixed": Fixed,
    "full": Full,
}
"""`method = "..."` -> what it is. A further method is a file with a subclass of Method, and a row here."""


def name_of(method: Method) -> str:
    """The name under which a method is registered, or of its class."""
    return next((name for name, kind in METHODS.items() if type(method) is kind), type(method).__name__)
