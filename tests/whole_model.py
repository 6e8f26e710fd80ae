"""A model with a trained method, as plain jitted functions over all positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lsg_jax.data.images import to_patches
from lsg_jax.methods.method_model import assemble
from lsg_jax.types import IGNORE, VisualInput


def visual(is_image, pixels, patch_size):
    """The fields of Batch for an image a row: is_image bool [B, T], pixels [B, H, W, C]."""
    source = np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1)[..., None].astype(np.int32)
    return {"images": VisualInput(np.stack([to_patches(image, patch_size)[None] for image in pixels])), "source": source}


@partial(jax.jit, static_argnames=("graphdef", "remat"))
def loss_and_gradients(parameters, frozen, batch, labels, graphdef, remat="none"):
    """((loss, logits), gradients) of what a method trains, over all positions, as PyTorch computes it."""

    def loss_of(parameters):
        model = assemble(graphdef, frozen, parameters)
        logits = model.language_model.logits(model(batch, remat=remat).hidden)
        target = labels[:, 1:]
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
        return jnp.mean(nats, where=target != IGNORE), logits

    return jax.value_and_grad(loss_of, has_aux=True)(parameters)


@partial(jax.jit, static_argnames="graphdef")
def plain_logits(frozen, batch, graphdef):
    """Logits of the model without a method."""
    model = assemble(graphdef, frozen)
    return model.language_model.logits(model(batch).hidden)
