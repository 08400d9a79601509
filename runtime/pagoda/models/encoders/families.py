"""The families of encoders. Defaults are those of transformers' configuration classes, which leave out of config.json what
equals them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.errors import CheckpointError
from pagoda.models.checkpoint_files import shown
from pagoda.models.config_reader import ConfigReader
from pagoda.models.encoders.config import (
    MAX_BUCKETS,
    MAX_TYPES,
    EncoderFamily,
    EncoderNames,
    Stored,
    read_activation,
    read_sizes,
)

_BERT_LAYER = "encoder.layer.{i}."


def _bert_names(*prefixes: str, has_types: bool = True) -> EncoderNames:
    attention = f"{_BERT_LAYER}attention."
    return EncoderNames(
        words=Stored.of("embeddings.word_embeddings"),
        positions=Stored.of("embeddings.position_embeddings"),
        types=Stored.of("embeddings.token_type_embeddings") if has_types else None,
        embedding_norm=Stored.of("embeddings.LayerNorm"),
        qkv=(tuple(Stored.of(f"{attention}self.{part}") for part in ("query", "key", "value")),),
        output=Stored.of(f"{attention}output.dense"),
        attention_norm=Stored.of(f"{attention}output.LayerNorm"),
        up=((Stored.of(f"{_BERT_LAYER}intermediate.dense"),),),
        down=Stored.of(f"{_BERT_LAYER}output.dense"),
        mlp_norm=Stored.of(f"{_BERT_LAYER}output.LayerNorm"),
        prefixes=("", *prefixes),
    )


def _read_bert_like(reader: ConfigReader, defaults: tuple[int, int, int, int, int], eps: float) -> dict[str, Any]:
    kind = reader.string("position_embedding_type", "absolute")
    if kind != "absolute":
        raise CheckpointError(f"{reader.where}: position_embedding_type {shown(kind)} is not supported; absolute is")
    if reader.flag("is_decoder", False):
        raise CheckpointError(f"{reader.where}: is_decoder is true; only encoders of this family are supported")
    return {
        **read_sizes(reader, defaults=defaults),
        "norm_eps": reader.number("layer_norm_eps", eps, high=1.0),
        "activation": read_activation(reader, "hidden_act"),
        "num_types": reader.integer("type_vocab_size", 2, low=0, high=MAX_TYPES),
    }


def _read_bert(reader: ConfigReader) -> dict[str, Any]:
    fields = _read_bert_like(reader, (30522, 768, 12, 12, 3072), 1e-12)
    return {
        **fields,
        "max_context_length": reader.integer("max_position_embeddings", 512),
        "names": _bert_names("bert.", has_types=fields["num_types"] > 0),
    }


def _read_roberta(reader: ConfigReader) -> dict[str, Any]:
    """Positions begin behind the one of the padding token."""
    fields = _read_bert_like(reader, (50265, 768, 12, 12, 3072), 1e-12)
    offset = reader.integer("pad_token_id", 1, low=0) + 1
    return {
        **fields,
        "position_offset": offset,
        "max_context_length": reader.integer("max_position_embeddings", 512) - offset,
        "names": _bert_names("roberta.", has_types=fields["num_types"] > 0),
    }


def _read_distilbert(reader: ConfigReader) -> dict[str, Any]:
    layer = "transformer.layer.{i}."
    return {
        **read_sizes(
            reader,
            hidden_size="dim",
            num_layers="n_layers",
            num_heads="n_heads",
            intermediate_size="hidden_dim",
            defaults=(30522, 768, 6, 12, 3072),
        ),
        "norm_eps": 1e-12,
        "activation": read_activation(reader, "activation"),
        "max_context_length": reader.integer("max_position_embeddings", 512),
        "names": EncoderNames(
            words=Stored.of("embeddings.word_embeddings"),
            positions=Stored.of("embeddings.position_embeddings"),
            embedding_norm=Stored.of("embeddings.LayerNorm"),
            qkv=(tuple(Stored.of(f"{layer}attention.{part}_lin") for part in "qkv"),),
            output=Stored.of(f"{layer}attention.out_lin"),
            attention_norm=Stored.of(f"{layer}sa_layer_norm"),
            up=((Stored.of(f"{layer}ffn.lin1"),),),
            down=Stored.of(f"{layer}ffn.lin2"),
            mlp_norm=Stored.of(f"{layer}output_layer_norm"),
            prefixes=("", "distilbert."),
        ),
    }


def _read_mpnet(reader: ConfigReader) -> dict[str, Any]:
    """Relative positions are added to the scores, by bucket, beside the absolute ones; padding is token 1, always."""
    attention = f"{_BERT_LAYER}attention."
    return {
        **read_sizes(reader, defaults=(30527, 768, 12, 12, 3072)),
        "norm_eps": reader.number("layer_norm_eps", 1e-12, high=1.0),
        "activation": read_activation(reader, "hidden_act"),
        "position_offset": 2,
        "max_context_length": reader.integer("max_position_embeddings", 512) - 2,
        "relative_buckets": reader.integer("relative_attention_num_buckets", 32, low=4, high=MAX_BUCKETS),
        "names": EncoderNames(
            words=Stored.of("embeddings.word_embeddings"),
            positions=Stored.of("embeddings.position_embeddings"),
            embedding_norm=Stored.of("embeddings.LayerNorm"),
            qkv=(tuple(Stored.of(f"{attention}attn.{part}") for part in "qkv"),),
            output=Stored.of(f"{attention}attn.o"),
            attention_norm=Stored.of(f"{attention}LayerNorm"),
            up=((Stored.of(f"{_BERT_LAYER}intermediate.dense"),),),
            down=Stored.of(f"{_BERT_LAYER}output.dense"),
            mlp_norm=Stored.of(f"{_BERT_LAYER}output.LayerNorm"),
            relative_bias="encoder.relative_attention_bias.weight",
            prefixes=("", "mpnet."),
        ),
    }


def _read_modernbert(reader: ConfigReader) -> dict[str, Any]:
    """Norms before attention and MLP, rotary positions, and layers that see `local_attention` tokens, half to each side."""
    sizes = read_sizes(reader, defaults=(50368, 768, 22, 12, 1152))
    every = reader.integer("global_attn_every_n_layers", 3)
    given = reader.strings("layer_types")
    types = given or tuple(
        "sliding_attention" if layer % every else "full_attention" for layer in range(sizes["num_layers"])
    )
    if len(types) != sizes["num_layers"] or not set(types) <= {"full_attention", "sliding_attention"}:
        raise reader.error("layer_types", "a list of full_attention and sliding_attention, one a layer")
    window = reader.integer("local_attention", 128, low=2) // 2
    thetas = {
        "full_attention": _theta_of(reader, "full_attention", reader.number("global_rope_theta", 160000.0)),
        "sliding_attention": _theta_of(reader, "sliding_attention", reader.number("local_rope_theta", 10000.0)),
    }
    attention_bias, mlp_bias = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
    return {
        **sizes,
        "max_context_length": reader.integer("max_position_embeddings", 8192),
        "norm_eps": reader.number("norm_eps", 1e-5, high=1.0),
        "norm_bias": reader.flag("norm_bias", False),
        "norm_first": True,
        "first_norm": False,
        "gated": True,
        "activation": read_activation(reader, "hidden_activation"),
        "windows": tuple(window if kind == "sliding_attention" else 0 for kind in types),
        "ropes": tuple(thetas[kind] for kind in types),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "names": EncoderNames(
            words=Stored.of("embeddings.tok_embeddings"),
            embedding_norm=Stored.of("embeddings.norm"),
            qkv=((Stored.of("layers.{i}.attn.Wqkv"),),),
            output=Stored.of("layers.{i}.attn.Wo"),
            attention_norm=Stored.of("layers.{i}.attn_norm"),
            up=((Stored.of("layers.{i}.mlp.Wi"),),),
            down=Stored.of("layers.{i}.mlp.Wo"),
            mlp_norm=Stored.of("layers.{i}.mlp_norm"),
            final_norm=Stored.of("final_norm"),
            prefixes=("", "model."),
        ),
    }


def _theta_of(reader: ConfigReader, kind: str, default: float) -> float:
    """The base frequency of one kind of layer, in transformers 5's spelling or the older one."""
    parameters = reader.mapping("rope_parameters").get(kind)
    if parameters is None:
        return default
    if not isinstance(parameters, dict):
        raise reader.error("rope_parameters", "an object for each kind of layer")
    rope = ConfigReader(parameters, f"{reader.where}, rope_parameters, {kind}")
    if (rope_type := rope.string("rope_type", "default")) != "default":
        raise CheckpointError(f"{rope.where}: rope type {shown(rope_type)} is not supported for encoders; default is")
    return rope.number("rope_theta", default)


def _read_nomic(reader: ConfigReader) -> dict[str, Any]:
    """Rotary positions and a gated MLP in BERT's order of norms; config.json in transformers' spelling or its authors'."""
    is_original = "n_embd" in reader.values
    if is_original:
        sizes = read_sizes(
            reader,
            hidden_size="n_embd",
            num_layers="n_layer",
            num_heads="n_head",
            intermediate_size="n_inner",
            defaults=(30528, 768, 12, 12, 3072),
        )
        for key, required in (("prenorm", False), ("qkv_proj_bias", False), ("rotary_emb_interleaved", False)):
            if reader.flag(key, required) is not required:
                raise reader.error(key, str(required).lower())
        if reader.number("rotary_emb_fraction", 1.0) != 1.0 or reader.values.get("num_experts"):
            raise CheckpointError(f"{reader.where}: only dense models with full rotary embedding are supported")
        theta = reader.number("rotary_emb_base", 10000.0)
        positions, activation = reader.integer("n_positions", 2048), read_activation(reader, "activation_function")
        eps = reader.number("layer_norm_epsilon", 1e-12, high=1.0)
    else:
        sizes = read_sizes(reader, defaults=(30528, 768, 12, 12, 3072))
        rope = ConfigReader(reader.mapping("rope_parameters"), f"{reader.where}, rope_parameters")
        if (rope_type := rope.string("rope_type", "default")) != "default":
            raise CheckpointError(
                f"{rope.where}: rope type {shown(rope_type)} is not supported for encoders; default is"
            )
        theta = rope.number("rope_theta", 1000.0)
        positions, activation = (
            reader.integer("max_position_embeddings", 2048),
            read_activation(reader, "hidden_act", "silu"),
        )
        eps = reader.number("layer_norm_eps", 1e-12, high=1.0)
    num_types = reader.integer("type_vocab_size", 2, low=0, high=MAX_TYPES)
    layers = ("layers.{i}.", "encoder.layers.{i}.")
    separate = tuple(Stored.of(*(f"{layer}self_attn.{part}_proj" for layer in layers)) for part in "qkv")
    fused = (Stored.of(*(f"{layer}attn.Wqkv" for layer in layers)),)

    def named(*ends: str) -> Stored:
        return Stored.of(*(f"{layer}{end}" for layer in layers for end in ends))

    return {
        **sizes,
        "max_context_length": positions,
        "norm_eps": eps,
        "gated": True,
        "activation": activation,
        "num_types": num_types,
        "ropes": (theta,) * sizes["num_layers"],
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "names": EncoderNames(
            words=Stored.of("embeddings.word_embeddings"),
            types=Stored.of("embeddings.token_type_embeddings") if num_types else None,
            embedding_norm=Stored.of("embeddings.LayerNorm", "emb_ln"),
            qkv=(separate, fused),
            output=named("self_attn.o_proj", "attn.out_proj"),
            attention_norm=named("post_attention_layernorm", "norm1"),
            up=((named("mlp.gate_proj", "mlp.fc12"), named("mlp.up_proj", "mlp.fc11")),),
            down=named("mlp.down_proj", "mlp.fc2"),
            mlp_norm=named("post_mlp_layernorm", "norm2"),
            prefixes=("", "model.", "bert.", "nomic_bert."),
        ),
    }


_ALL = (
    EncoderFamily(("bert",), "BertModel", _read_bert),
    EncoderFamily(("roberta", "xlm-roberta", "camembert"), "RobertaModel", _read_roberta),
    EncoderFamily(("distilbert",), "DistilBertModel", _read_distilbert),
    EncoderFamily(("mpnet",), "MPNetModel", _read_mpnet),
    EncoderFamily(("modernbert",), "ModernBertModel", _read_modernbert),
    EncoderFamily(("nomic_bert",), "NomicBertModel", _read_nomic),
)
FAMILIES: dict[str, EncoderFamily] = {name: family for family in _ALL for name in family.model_types}


def encoder_family(values: Mapping[str, Any]) -> EncoderFamily | None:
    """The family of the model that config.json describes by `model_type`; None for one that is no encoder."""
    return FAMILIES.get(str(values.get("model_type")))
