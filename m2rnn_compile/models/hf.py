# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: importing this module registers the models with `AutoModelForCausalLM` (extra `hf`).

    import m2rnn_compile.models.hf
    model = AutoModelForCausalLM.from_pretrained(folder)      # a folder of save_pretrained, or of weights.save_model
    model.generate(**tokenizer("...", return_tensors="pt"), max_new_tokens=50, num_beams=4)

Tensors have the names that `HybridLM` gives them, so the folders can be read by `weights.load_model` too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        "m2rnn_compile.models.hf needs transformers 5 (tested: 5.23.0); run: pip install 'm2rnn-compile[hf]'",
        name=error.name,
    ) from error

from ..layers import Cache, select_rows
from .config import LMConfig
from .hf_packing import document_bounds
from .lm import HybridLM
from .presets import preset
from .weights import MODEL_TYPE


class M2RNNHybridConfig(PreTrainedConfig):
    """A `LMConfig` as transformers stores it.

    Args:
        lm: ``LMConfig.to_dict()``; default the preset "m2rnn-410m".
    """

    model_type = MODEL_TYPE

    lm: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: LMConfig, **options: Any) -> M2RNNHybridConfig:
        """Wrap `config`; options such as ``eos_token_id`` go to transformers."""
        return cls(lm=config.to_dict(), **options)

    @property
    def lm_config(self) -> LMConfig:
        """The config of this library.

        Raises:
            ValueError: fields are unknown or missing.
        """
        return preset("m2rnn-410m") if self.lm is None else LMConfig.from_dict(self.lm)

    @property
    def vocab_size(self) -> int:
        return self.lm_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        """What `resize_token_embeddings` sets."""
        self.lm = dataclasses.replace(self.lm_config, vocab_size=value).to_dict()

    @property
    def hidden_size(self) -> int:
        return self.lm_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.lm_config.num_layers


class HybridCache:
    """The decode caches of all layers, in the form that `generate` hands round.

    Attributes:
        layers: one mixer's cache a layer; None before the first tokens.
        seen: tokens so far, padding included.
    """

    is_compileable = False

    def __init__(self, layers: tuple[Cache, ...] | None = None, seen: int = 0) -> None:
        self.layers, self.seen = layers, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, in that order: what beam search does after every step."""
        if self.layers is not None:
            self.layers = select_rows(self.layers, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.layers is not None:
            rows = next(iter(torch.utils._pytree.tree_leaves(self.layers)))
            self.reorder_cache(torch.arange(rows.shape[0], device=rows.device).repeat_interleave(repeats))

    def __len__(self) -> int:
        return 0 if self.layers is None else len(self.layers)


class _SharedLM(HybridLM):
    """A `HybridLM` whose config is also written into the one that transformers stores.

    Whatever changes it (a swapped layer, a larger vocabulary), a saved folder says what its weights are.
    """

    _stored: M2RNNHybridConfig

    def __init__(self, stored: M2RNNHybridConfig) -> None:
        object.__setattr__(self, "_stored", stored)  # needed by the setter, which runs before there is a Module
        super().__init__(stored.lm_config)

    @property
    def config(self) -> LMConfig:
        return self._config

    @config.setter
    def config(self, value: LMConfig) -> None:
        self._config = value
        self._stored.lm = value.to_dict()


class M2RNNHybridForCausalLM(PreTrainedModel, GenerationMixin):
    """`HybridLM` for transformers: `generate`, `save_pretrained`, `from_pretrained`, and a loss from `labels`.

    Not supported, since a recurrent state cannot go back: assisted decoding and cropping of caches.
    """

    config_class = M2RNNHybridConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _is_stateful = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["decay_gate"]  # f rounded to bf16 freezes the state

    def __init__(self, config: M2RNNHybridConfig) -> None:
        super().__init__(config)
        lm = _SharedLM(config)
        self.transformer = lm.transformer  # so that tensors are called transformer....
        object.__setattr__(self, "_lm", lm)  # not a submodule of its own: it shares the trunk
        self.post_init()

    @property
    def lm(self) -> HybridLM:
        """The model of this library, on the same weights."""
        return self._lm

    def _init_weights(self, module: nn.Module) -> None:
        """Every layer knows how it starts; transformers' own rule would undo the scaled output projections."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif not isinstance(module, nn.Linear) and callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.wte = value
        self._lm.config = dataclasses.replace(self._lm.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> None:
        """None: the head is the embedding."""
        return None

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes a HybridCache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss if `labels` are given.

        Args:
            input_ids: ``[B, T]``; with `past_key_values`, only what is new.
            attention_mask: ``[B, T]`` or ``[B, past + T]``, 0 on *left* padding, of which each turn may have its own.
                Without a cache padding may be on the right instead, where it needs no mask: nothing real comes after
                it. Under torch.compile nobody looks.
            past_key_values: from an earlier call; it is not modified (a new one comes back).
            labels: ``[B, T]``, the tokens themselves (shifted in here); -100 is left out. A mixture of experts in
                training mode adds its auxiliary loss, of all passes of a batch once.
            use_cache: return a cache; default: if one was given, or in eval mode without labels and without padding on
                the right.
            logits_to_keep: only of the last so many positions; 0 for all.
            output_hidden_states: return what goes into every block, and what goes into the head; default: the config's.
            options: `num_items_in_batch` of a Trainer. `cu_seq_lens_q` and `cu_seq_lens_k`, `position_ids` that start
                again, and `seq_idx` pack documents into one row, as `DataCollatorWithFlattening` does: they see nothing
                of each other, no loss is taken from one to the next, and there is no cache. Other positions change
                nothing (recurrent layers need none, attention takes slots).

        Raises:
            ValueError: `inputs_embeds` or `output_attentions`; packed documents in several rows, with padding or with a
                cache, or told of in two ways that do not agree; padding between tokens, or on their right where there
                is a cache.
        """
        if input_ids is None or options.get("inputs_embeds") is not None:
            raise ValueError(
                "`input_ids` are needed, `inputs_embeds` are not supported; vectors of your own can be rows of the "
                "embedding (resize_token_embeddings), which have ids"
            )
        if options.get("output_attentions"):
            raise ValueError("`output_attentions` is not supported: no layer keeps weights of attention; leave it out")
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        T = input_ids.shape[1]
        layers = None
        if past_key_values is not None and past_key_values.layers is not None:
            layers = past_key_values.layers
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, -T:].to(torch.bool)
            if not torch.compiler.is_compiling():
                if bool(mask.all()):
                    mask = None
                elif _ends_in_padding(mask):
                    if use_cache or past_key_values is not None:
                        raise ValueError(
                            "`attention_mask` has padding on the right (a 0 after a 1), and there is a cache, from "
                            "which nothing could go on; pad on the left (tokenizer.padding_side = 'left'), or give "
                            "use_cache=False"
                        )
                    use_cache = False
        bounds = document_bounds(input_ids, mask, layers is not None, options)
        if bounds is not None:
            if use_cache or past_key_values is not None:
                raise ValueError(
                    "packed documents (`cu_seq_lens_q`, `position_ids` or `seq_idx`) have no cache; give "
                    "use_cache=False, or generate from one document, or from several in a left-padded batch"
                )
            use_cache = False
            if labels is not None:
                first = torch.zeros(T + 1, dtype=torch.bool, device=labels.device)
                first[bounds.to(labels.device, torch.int64)] = True
                labels = labels.masked_fill(first[:T], -100)
        if use_cache is None:
            use_cache = past_key_values is not None or (not self.training and labels is None)
        if use_cache and layers is None:
            layers = self._lm.init_cache(input_ids.shape[0], device=input_ids.device, dtype=self.dtype)
        states: list[Tensor] | None = [] if output_hidden_states else None
        x, new, aux_losses = self._lm._run(input_ids, layers, attention_mask=mask, cu_seqlens=bounds, states=states)
        if states is not None:
            states.append(self.transformer.ln_f(x))
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = self._lm._head(x)
        loss = None
        if labels is not None:
            items = {k: v for k, v in options.items() if k == "num_items_in_batch"}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **items)
            moe = self._lm.config.moe
            if moe is not None and aux_losses:
                aux_loss = torch.stack(aux_losses).sum()
                if (all_items := items.get("num_items_in_batch")) is not None:
                    # The losses of a batch's passes are added up: each counts for as much as it has targets.
                    aux_loss = aux_loss * (labels[:, 1:] != -100).sum() / all_items
                loss = loss + moe.aux_loss_weight * aux_loss
        seen = (0 if past_key_values is None else past_key_values.seen) + T
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=HybridCache(new, seen) if use_cache else None,
            hidden_states=None if states is None else tuple(states),
        )
        return out if return_dict is not False else out.to_tuple()

    def _prefill(self, input_ids: Tensor, generation_config: GenerationConfig, *args: Any, **options: Any) -> Any:
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"`prefill_chunk_size` = {generation_config.prefill_chunk_size} is not supported: transformers expects "
                "of it a cache that changes in place; leave it out, or m2rnn_compile.models.generate(model.lm, prompt, "
                "prefill_chunk=...)"
            )
        return super()._prefill(input_ids, generation_config, *args, **options)


def _ends_in_padding(mask: Tensor) -> bool:
    """Whether a row of the bool ``[B, T]`` has padding after what is real.

    Raises:
        ValueError: something real follows that padding, so it is no padding but a gap.
    """
    before, after = mask[:, :-1], mask[:, 1:]
    if bool((after & ~before & (before.cumsum(1) > 0)).any()):
        raise ValueError(
            "`attention_mask` has a gap: in a row 1 comes again after 1 and 0, and no layer can leave tokens out; pad "
            "on the left, or, for padding between the turns of a batch, go on from the `past_key_values` of the turn "
            "before"
        )
    return bool((before & ~after).any())


def from_hybrid(model: HybridLM, **options: Any) -> M2RNNHybridForCausalLM:
    """A transformers model on (copies of) the weights of `model`; options such as ``eos_token_id`` go to its config."""
    config = M2RNNHybridConfig.of(model.config, dtype=next(model.parameters()).dtype, **options)
    with torch.device(next(model.parameters()).device):
        wrapped = M2RNNHybridForCausalLM(config).to(next(model.parameters()).dtype)
    for (_, mine), (_, theirs) in _pairs(wrapped, model):
        mine.data = theirs.detach().clone()
    return wrapped.train(model.training)


def _pairs(a: nn.Module, b: nn.Module) -> Iterator[tuple[tuple[str, nn.Parameter], tuple[str, nn.Parameter]]]:
    return zip(a.named_parameters(), b.named_parameters(), strict=True)


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the models; done once, by the import."""
    AutoConfig.register(MODEL_TYPE, M2RNNHybridConfig, exist_ok=True)
    AutoModelForCausalLM.register(M2RNNHybridConfig, M2RNNHybridForCausalLM, exist_ok=True)


register()

__all__ = ["HybridCache", "M2RNNHybridConfig", "M2RNNHybridForCausalLM", "from_hybrid", "register"]
