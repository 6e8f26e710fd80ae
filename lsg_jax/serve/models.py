"""The models that a request can choose: the loaded weights under each method that the server offers."""

from __future__ import annotations

from typing import Any

from lsg_jax.errors import ConfigError, InputError
from lsg_jax.methods.coefficients import Coefficients, layer_coefficients
from lsg_jax.methods.method import BASE
from lsg_jax.methods.registry import name_of
from lsg_jax.serve.engine import Model
from lsg_jax.serve.request import OWN, Refused, shortened
from lsg_jax.vlm import VLM


class Models:
    """`base`, `gates` (or what else was opened with the model) and `coefficients`, as far as the model knows them.

    Attributes:
        names: of the methods.
        default: the method of a request that names none.

    Raises:
        ConfigError: the opened method answers in another way than token by token from one pass.
    """

    def __init__(self, vlm: VLM):
        if vlm.method.contrasts or vlm.method.first_questions("question"):
            raise ConfigError(
                f"lsg serve cannot answer with method {name_of(vlm.method)}: ask with `lsg eval` or `lsg generate`"
            )
        self._vlm = vlm
        base = vlm.plain()
        self._fixed = {"base": Model("base", base, base.processor)}
        if vlm.method is not BASE:
            self._fixed["gates"] = Model("gates", vlm, vlm.processor)
        self.default = "gates" if "gates" in self._fixed else "base"
        coefficients = ["coefficients"] if vlm.config.sinks.knows_v_sinks else []
        self.names = [*self._fixed, *coefficients]

    def choose(self, method: str | None, coefficients: Any) -> Model:
        """The model of a request. Refused if there is none."""
        name = self.default if method is None else method
        if name not in self.names:
            known = ", ".join(self.names)
            raise Refused(
                400,
                f"{OWN}.method: {shortened(repr(name))} is not offered; choose among {known}",
                param=OWN,
                code="invalid_value",
            )
        if name != "coefficients":
            return self._fixed[name]
        try:
            parameters = layer_coefficients(coefficients, self._vlm.config)
        except InputError as error:
            raise Refused(400, f"{OWN}.{error}", param=OWN, code="invalid_value") from None
        changed = self._vlm.with_method(Coefficients(), parameters)
        return Model((name, parameters["by_layer"].tobytes()), changed, self._fixed["base"].processor)
