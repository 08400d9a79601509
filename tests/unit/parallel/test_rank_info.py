"""Ranks that do not fit together are told apart in a sentence each."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.models.dummy import DummySpec, write_dummy_checkpoint
from pagoda.parallel.rank_info import (
    RankInfo,
    configuration_hash,
    describe_rank,
    find_mismatches,
    model_hash,
    rank_table,
)


def info(rank: int, host: str, **changed: object) -> RankInfo:
    like = RankInfo(
        rank=rank,
        host=host,
        pid=100 + rank,
        pagoda="0.1.0",
        python="3.11",
        torch="2.13.0",
        nccl=None,
        ray="2.60.0",
        model_hash="abc",
        configuration_hash="def",
        dtype="float32",
        device="cpu",
        device_name="CPU",
        memory_bytes=2**34,
        interface="eth0",
        address=f"10.0.0.{rank}",
    )
    return replace(like, **changed)


def test_equal_ranks_may_differ_in_place_memory_and_card() -> None:
    other = info(1, "b", memory_bytes=2**33, device_name="another CPU", interface="eth1")
    assert find_mismatches([info(0, "a"), other]) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"torch": "2.12.0"}, "versions of torch differ: 2.13.0 on ranks 0 and 1 (a), 2.12.0 on rank 2 (b)"),
        ({"ray": "2.50.0"}, "versions of Ray differ: 2.60.0 on ranks 0 and 1 (a), 2.50.0 on rank 2 (b)"),
        ({"pagoda": "0.2.0"}, "versions of Pagoda differ: 0.1.0 on ranks 0 and 1 (a), 0.2.0 on rank 2 (b)"),
        ({"python": "3.12"}, "versions of Python differ: 3.11 on ranks 0 and 1 (a), 3.12 on rank 2 (b)"),
        ({"nccl": "2.27.3"}, "versions of NCCL differ: none on ranks 0 and 1 (a), 2.27.3 on rank 2 (b)"),
        ({"model_hash": "xyz"}, "abc on ranks 0 and 1 (a), xyz on rank 2 (b); put the same model on every node"),
        ({"configuration_hash": "x"}, "configurations (hash) differ: def on ranks 0 and 1 (a), x on rank 2 (b)"),
        ({"dtype": "bfloat16"}, "dtypes differ: float32 on ranks 0 and 1 (a), bfloat16 on rank 2 (b)"),
        ({"device": "cuda"}, "kinds of device differ: cpu on ranks 0 and 1 (a), cuda on rank 2 (b)"),
    ],
)
def test_a_difference_names_ranks_hosts_and_both_values(changed: dict[str, str], words: str) -> None:
    sentences = find_mismatches([info(0, "a"), info(1, "a"), info(2, "b", **changed)])
    assert len(sentences) == 1
    assert words in sentences[0]


def test_a_loopback_is_of_no_use_to_ranks_on_several_hosts() -> None:
    local = {"interface": "lo", "address": "127.0.0.1"}
    assert find_mismatches([info(0, "a", **local), info(1, "a", **local)]) == []
    assert find_mismatches([info(0, "a", **local), info(1, "b")]) == [
        "rank 0 on a talks over lo (127.0.0.1), which no other host reaches; set network_interface"
    ]


def test_every_difference_has_its_own_sentence() -> None:
    sentences = find_mismatches([info(0, "a"), info(1, "b", torch="2.12.0", model_hash="xyz")])
    assert [sentence.split(" differ")[0] for sentence in sentences] == [
        "versions of torch",
        "checkpoints (hash of config.json and the weights' index)",
    ]


def test_a_rank_describes_the_process_it_runs_in(tmp_path: Path) -> None:
    checkpoint = write_dummy_checkpoint(tmp_path / "model")
    described = describe_rank(
        PagodaConfig(),
        rank=3,
        model_directory=checkpoint,
        device="cpu",
        device_name="CPU",
        memory_bytes=2**30,
        dtype="float32",
        nccl=None,
        uses_ray=False,
        interface="lo",
        address="127.0.0.1",
    )
    assert described.model_hash == model_hash(checkpoint)
    assert described.ray is None
    assert described.where.startswith("rank 3 on ")
    assert "over lo (127.0.0.1)" in rank_table([described])[0]


def test_the_model_hash_is_that_of_content_not_of_place(tmp_path: Path) -> None:
    here = write_dummy_checkpoint(tmp_path / "here")
    there = write_dummy_checkpoint(tmp_path / "there")
    assert model_hash(here) == model_hash(there)


def test_another_shape_or_another_config_has_another_hash(tmp_path: Path) -> None:
    checkpoint = write_dummy_checkpoint(tmp_path / "model")
    before = model_hash(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    other_config = model_hash(checkpoint)
    weights = next(checkpoint.glob("*.safetensors"))
    with weights.open("ab") as file:
        file.write(b"\0" * 8)
    assert len({before, other_config, model_hash(checkpoint)}) == 3


def test_the_same_shape_with_other_weights_has_another_hash(tmp_path: Path) -> None:
    checkpoint = write_dummy_checkpoint(tmp_path / "model")
    tuned = write_dummy_checkpoint(tmp_path / "tuned", DummySpec(seed=1))
    assert model_hash(checkpoint) != model_hash(tuned)


def test_the_configuration_hash_leaves_out_what_may_differ_from_node_to_node() -> None:
    plain = configuration_hash(PagodaConfig())
    assert configuration_hash(PagodaConfig(threads=3, http_port=9000, api_keys=("k",))) == plain
    assert configuration_hash(PagodaConfig(block_size=32)) != plain
    assert configuration_hash(PagodaConfig(dtype="float32")) != plain
