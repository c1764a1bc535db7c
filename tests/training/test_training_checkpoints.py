"""What a checkpoint holds, what it refuses, and what happens to damaged ones."""

import dataclasses
import json
import os
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, from_dict, to_dict
from oasis_jax.data import load_corpus
from oasis_jax.errors import UserError
from oasis_jax.model.layout import unstack_layers
from oasis_jax.placement import make_mesh
from oasis_jax.pretrained import load_pretrained
from oasis_jax.training import manifest
from oasis_jax.training.array_checksums import checksums
from oasis_jax.training.checkpoints import Checkpoints, Keep
from oasis_jax.training.description import check_corpus, describe, differing_fields
from oasis_jax.training.load import load_run
from oasis_jax.training.loop import with_sizes
from oasis_jax.training.state import build_model, new_state

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
STEPS = (3, 6, 9)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(9):
        (folder / f"{i}.txt").write_text(" ".join(f"{i * k % 97} apples" for k in range(60)))
    return folder


@pytest.fixture(scope="module")
def run(text):
    """(asked config, config with its vocabulary, corpus, states by step) of a run that never took place."""
    asked = Config(
        model=ModelConfig(preset="oasis_blocks", blocks=2, num_layers=1, width=14, num_heads=1, mlp_dim=22),
        data=DataConfig(
            corpus="files",
            pattern=f"{text}/*.txt",
            tokenizer="bpe",
            bpe_vocab_size=300,
            sequence_length=9,
            batch_size=2,
            holdout_fraction=0.2,
        ),
        run=RunConfig(steps=20),
    )
    corpus = load_corpus(asked.data, seed=0)
    config = with_sizes(asked, corpus)
    first = new_state(config, MESH)
    states = {}
    for step in STEPS:
        arrays = jax.tree.map(
            lambda x, step=step: x + jnp.asarray(step / 7, x.dtype), first._replace(rng=None, step=None)
        )
        states[step] = arrays._replace(rng=jax.random.key(step), step=jnp.int32(step))
    return asked, config, corpus, states


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def written(run, tmp_path_factory) -> pathlib.Path:
    _, config, corpus, states = run
    workdir = tmp_path_factory.mktemp("written")
    with Checkpoints(workdir, keep=Keep(2), say=print) as checkpoints:
        for step, state in states.items():
            checkpoints.save(
                state, step=step, data_state={"next_index": 5 * step}, description=describe(config, corpus)
            )
    return workdir


@pytest.fixture
def workdir(written, tmp_path) -> pathlib.Path:
    """A copy that may be damaged."""
    return shutil.copytree(written, tmp_path / "run")


def resume(config, workdir, said):
    with Checkpoints(workdir, keep=Keep(2), say=said.append) as checkpoints:
        return checkpoints.resume(config, MESH)


def equal(first, second) -> bool:
    bits = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.all(
        jax.tree.map(lambda x, y: np.array_equal(bits(x), bits(y)) and x.dtype == y.dtype, first, second)
    )


def test_everything_comes_back(run, workdir, said):
    asked, config, corpus, states = run
    resumed = resume(asked, workdir, said)
    assert resumed.step == 9
    assert equal(resumed.state, states[9])
    assert jax.tree.structure(resumed.state) == jax.tree.structure(states[9])
    assert resumed.data_state == {"next_index": 45}
    assert resumed.tokenizer.to_json() == corpus.tokenizer.to_json()
    assert resumed.corpus_identity == corpus.identity
    assert said == []
    with Checkpoints(workdir, keep=None, say=said.append) as checkpoints:
        metadata = checkpoints.metadata(9)
    assert from_dict(metadata["config"]) == config
    assert metadata["layout"] == "2: embedding, head, layers, routers, final_norm"
    assert {"python", "oasis_jax", "jax", "flax", "optax", "orbax-checkpoint"} == set(metadata["versions"])
    assert metadata["versions"]["jax"] == jax.__version__


def test_the_newest_are_kept(workdir):
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "9"]


NAMES = [
    "a[1]b",
    "a*b",
    "a?b",
    "a\\b",
    "$HOME",
    "a&b<c>",
    " a b ",
    "a\nb",
    "-a",
    "x" * 255,
    os.fsdecode(b"a\xffb"),
    "{a}",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_whatever_a_workdir_is_called(run, written, tmp_path, said, name):
    asked, config, corpus, states = run
    workdir = tmp_path / name
    workdir.mkdir()
    with Checkpoints(workdir, keep=Keep(1), say=said.append) as checkpoints:
        for step in (3, 6):
            checkpoints.save(states[step], step=step, data_state={}, description=describe(config, corpus))
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["6"]
    resumed = resume(asked, workdir, said)
    assert resumed.step == 6 and equal(resumed.state, states[6])
    assert said == []


def test_an_empty_workdir_is_a_new_run(run, tmp_path, said):
    assert resume(run[0], tmp_path, said) is None


# Damage


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


DAMAGE = [truncate, empty, pathlib.Path.unlink]


@pytest.mark.parametrize("harm", DAMAGE, ids=["truncated", "emptied", "deleted"])
def test_any_damaged_file_of_the_newest_falls_back_and_says_so(run, written, tmp_path, harm):
    """Every file of the newest checkpoint in turn, the list of them and the storage library's own included."""
    asked, _, _, states = run
    names = [path.relative_to(written) for path in (written / "checkpoints" / "9").rglob("*") if path.is_file()]
    assert {"params", "rest", "metadata", "files.json", "_CHECKPOINT_METADATA"} <= {name.parts[2] for name in names}
    for i, name in enumerate(sorted(names)):
        workdir, said = shutil.copytree(written, tmp_path / str(i)), []
        harm(workdir / name)
        resumed = resume(asked, workdir, said)
        assert equal(resumed.state, states[resumed.step])
        assert resumed.step == 6, name
        line, aside = said
        assert line.startswith("checkpoint 9 is not whole, step 6 is used instead: ")
        assert name.relative_to("checkpoints/9").as_posix() in line and line.endswith("; 3 steps lost")
        assert "\n" not in line
        assert aside == f"checkpoint 9 is set aside in {workdir / 'checkpoints_broken'}"
        assert resumed.data_state == {"next_index": 30}
        assert (workdir / "checkpoints_broken" / "9").is_dir()
        assert not (workdir / "checkpoints" / "9").exists()


@pytest.mark.parametrize("harm", ["added", "another step's", "no files", "a list", "an older list"])
def test_a_list_or_folder_of_something_else_is_damage(run, workdir, said, harm):
    folder = workdir / "checkpoints" / "9"
    listed = json.loads((folder / "files.json").read_text())
    if harm == "added":
        (folder / "rest" / "more").write_text("more")
    if harm == "another step's":
        shutil.rmtree(folder)
        shutil.copytree(workdir / "checkpoints" / "6", folder)
    if harm == "no files":
        (folder / "files.json").write_text(manifest._text({"step": 9, "sealed": True, "files": {}}))
    if harm == "a list":
        (folder / "files.json").write_text("[]")
    if harm == "an older list":  # of sizes alone, one of them another
        sizes = {name: size for name, (size, _) in listed["files"].items()}
        (folder / "files.json").write_text(json.dumps(sizes | {"params/_METADATA": 3}))
    assert resume(run[0], workdir, said).step == 6
    assert (workdir / "checkpoints_broken" / "9").is_dir()


def test_a_checkpoint_of_a_version_that_listed_sizes_only_is_used_and_called_unverified(run, workdir, said):
    path = workdir / "checkpoints" / "9" / "files.json"
    path.write_text(json.dumps({name: size for name, (size, _) in json.loads(path.read_text())["files"].items()}))
    assert resume(run[0], workdir, said).step == 9
    assert said == ["checkpoint 9 was written without checksums: its files are not verified"]


def test_of_a_thousand_flipped_bits_none_is_silent(written, tmp_path):
    """Over all files, by size and by number, so that small ones get their share."""
    folder = shutil.copytree(written / "checkpoints" / "9", tmp_path / "9")
    with manifest.Inspection(folder) as inspection:
        inspection.finish()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    random = np.random.default_rng(5)
    sizes = np.array([path.stat().st_size for path in files])
    chosen = [*random.choice(len(files), 500), *random.choice(len(files), 500, p=sizes / sizes.sum())]
    silent = []
    for place in chosen:
        path, bit = files[place], int(random.integers(8 * sizes[place]))
        content = path.read_bytes()
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            with manifest.Inspection(folder) as inspection:
                inspection.finish()
            silent.append((path.name, bit))
        except manifest.Damaged as damage:
            assert path.relative_to(folder).as_posix() in str(damage)
        path.write_bytes(content)
    assert silent == []


@pytest.mark.parametrize(
    "part", ["params/ocdbt.process_0/d", "rest/ocdbt.process_0/d", "metadata", "files.json", "params/_sharding"]
)
def test_a_flipped_bit_is_named_and_training_and_reading_take_the_checkpoint_before(run, workdir, said, capsys, part):
    place = workdir / "checkpoints" / "9" / part
    path = place if place.is_file() else max(place.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert load_run(workdir).step == 6
    assert load_pretrained(workdir).card["step"] == 6
    assert f"{path.name} has changed" in capsys.readouterr().err
    resumed = resume(run[0], workdir, said)
    assert resumed.step == 6 and equal(resumed.state, run[3][6])
    assert f"{path.name} has changed" in said[0]


def test_an_array_that_is_not_the_one_that_was_saved_is_damage(run, tmp_path, said, monkeypatch):
    """Files that are whole but hold something else: what only the checksums of arrays can see."""
    asked, config, corpus, states = run
    with Checkpoints(tmp_path, keep=Keep(2), say=said.append) as checkpoints:
        checkpoints.save(states[6], step=6, data_state={}, description=describe(config, corpus))
        other = jax.tree.map(lambda x: x, states[9].params)
        other["embedding"]["table"] = other["embedding"]["table"].at[3, 2].add(1e-6)
        wrong = checksums({"params": other, "rest": states[9]._replace(params=None)._asdict()})
        monkeypatch.setattr("oasis_jax.training.checkpoints.checksums", lambda tree: wrong)
        checkpoints.save(states[9], step=9, data_state={}, description=describe(config, corpus))
        checkpoints.wait()
        monkeypatch.undo()
        assert checkpoints.resume(asked, MESH).step == 6
    assert said[0].startswith("checkpoint 9 is not whole, step 6 is used instead: array params.embedding.table ")


def test_older_checkpoints_with_damaged_lists_do_not_stop_a_run_that_keeps_the_best(run, workdir, said):
    truncate(workdir / "checkpoints" / "6" / "_CHECKPOINT_METADATA")
    with Checkpoints(workdir, keep=Keep(2, best=1), say=said.append) as checkpoints:
        assert checkpoints.resume(run[0], MESH).step == 9
        assert checkpoints.steps() == [9]
    assert said[0].startswith("checkpoint 6 is not whole: _CHECKPOINT_METADATA has ")


def test_a_checkpoint_whose_run_was_killed_before_its_list_was_complete_is_whole(run, workdir, said):
    folder = workdir / "checkpoints" / "9"
    manifest.write(folder, 9, late=False)
    assert resume(run[0], workdir, said).step == 9
    assert said == []
    truncate(folder / "_CHECKPOINT_METADATA")  # which the resumed run has listed
    assert resume(run[0], workdir, said).step == 6


def test_damage_that_keeps_the_size_falls_back_too(run, workdir, said):
    path = workdir / "checkpoints" / "9" / "metadata" / "metadata"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert resume(run[0], workdir, said).step == 6


def test_the_place_of_a_broken_checkpoint_can_be_saved_to_again(run, workdir, said):
    asked, config, corpus, states = run
    for attempt in range(2):
        truncate(workdir / "checkpoints" / "9" / "rest" / "manifest.ocdbt")
        with Checkpoints(workdir, keep=Keep(2), say=said.append) as checkpoints:
            assert checkpoints.resume(asked, MESH).step == 6
            checkpoints.save(states[9], step=9, data_state={}, description=describe(config, corpus))
        assert len(list((workdir / "checkpoints_broken").iterdir())) == attempt + 1
    assert resume(asked, workdir, said).step == 9


def test_a_deleted_newest_checkpoint(run, workdir, said):
    shutil.rmtree(workdir / "checkpoints" / "9")
    assert resume(run[0], workdir, said).step == 6


def test_what_a_killed_save_leaves_is_cleared(run, workdir, said):
    shutil.copytree(workdir / "checkpoints" / "9", workdir / "checkpoints" / "12.orbax-checkpoint-tmp")
    assert resume(run[0], workdir, said).step == 9
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "9"]


def test_no_whole_checkpoint(run, workdir, said):
    for step in ("6", "9"):
        truncate(workdir / "checkpoints" / step / "files.json")
    for attempt in (lambda: resume(run[0], workdir, said), lambda: load_run(workdir)):
        with pytest.raises(UserError, match=r"no whole checkpoint \(9: .*; 6: ") as error:
            attempt()
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "9"]


def test_what_a_run_deletes_while_it_is_read_is_looked_for_again(run, workdir, written):
    for step in ("6", "9"):
        shutil.rmtree(workdir / "checkpoints" / step)
    folder = shutil.copytree(written / "checkpoints" / "6", workdir / "checkpoints" / "6")
    with Checkpoints(workdir, keep=None, say=print) as checkpoints:
        folder.rename(folder.with_name("12"))
        manifest.write(folder.with_name("12"), 12, late=True)
        assert checkpoints.first_whole(lambda step: step, checkpoints.steps()) == (12, [])


# Another run


def changed(config, **fields):
    for name, value in fields.items():
        section, field = name.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    return config


def test_another_config_is_refused_by_the_names_of_its_fields(run, workdir, said):
    asked = changed(run[0], model__width=28, data__sequence_length=10, optimizer__beta2=0.99, run__seed=1)
    with pytest.raises(UserError) as error:
        resume(asked, workdir, said)
    assert (
        "model.width is 14 there, 28 now; data.sequence_length is 9 there, 10 now; optimizer.beta2 is 0.95 there, "
        "0.99 now; " in str(error.value)
    )
    assert "run.seed is 0 there, 1 now; take these values or another workdir" in str(error.value)


def test_what_may_differ(run, workdir, said):
    asked = changed(
        run[0], model__remat="layer", model__stack="scan", model__attention_implementation="reference",
        optimizer__accumulation_steps=2, mesh__data=1, mesh__rules=(("batch", ("data",)),), run__log_interval=7,
        run__telemetry_interval=0, run__eval_interval=3, run__eval_batches=1, run__checkpoint_interval=2,
        run__keep_checkpoints=5, run__tensorboard=True,
    )  # fmt: skip
    assert resume(asked, workdir, said).step == 9


def test_every_other_field_is_compared():
    config = Config(model=ModelConfig(vocab_size=258))
    fields = [f"{section}.{name}" for section, values in to_dict(config).items() for name in values]
    other = to_dict(config)
    compared = [line.split()[0] for line in differing_fields(_Everything(other), config)]
    free = [name for name in fields if name not in compared]
    assert set(free) == {
        "model.remat", "model.stack", "model.attention_implementation", "model.depth_implementation", "data.pattern",
        "optimizer.accumulation_steps", "optimizer.nonfinite", "optimizer.nonfinite_limit",
        "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "mesh.rules",
        "run.log_interval", "run.telemetry_interval", "run.eval_interval", "run.eval_batches",
        "run.checkpoint_interval", "run.keep_checkpoints", "run.keep_every", "run.keep_best", "run.tensorboard",
    }  # fmt: skip


class _Everything:
    """A config whose every field has another value than any other config's, but for the schedule."""

    def __init__(self, values):
        for name, fields in values.items():
            setattr(self, name, type("Section", (), dict.fromkeys(fields, object())))
        self.optimizer.schedule = "linear"


def test_only_a_constant_schedule_can_be_made_longer():
    for schedule, expected in [
        ("cosine", ["run.steps is 300 there, 400 now"]),
        ("linear", ["run.steps is 300 there, 400 now"]),
        ("constant", []),
    ]:
        stored = Config(optimizer=OptimizerConfig(schedule=schedule))
        assert differing_fields(changed(stored, run__steps=400), stored) == expected


def test_a_vocabulary_is_only_compared_when_asked_for():
    stored = Config(model=ModelConfig(vocab_size=258))
    assert differing_fields(Config(), stored) == []
    assert differing_fields(changed(stored, model__vocab_size=300), stored) == [
        "model.vocab_size is 258 there, 300 now"
    ]


def test_another_corpus_is_refused_by_name(run, text, tmp_path):
    asked, _, corpus, _ = run
    moved = shutil.copytree(text, tmp_path / "moved")
    elsewhere = dataclasses.replace(asked.data, pattern=f"{moved}/*.txt")
    check_corpus(load_corpus(elsewhere, seed=0, tokenizer=corpus.tokenizer), corpus.identity)
    (moved / "3.txt").write_text("something else " * 60)
    with pytest.raises(
        UserError, match=r"the corpus is not the one this run was trained on \(sha256 was '.*', is '.*'; bytes was"
    ) as error:
        check_corpus(load_corpus(elsewhere, seed=0, tokenizer=corpus.tokenizer), corpus.identity)
    assert "\n" not in str(error.value)


def test_another_split_of_the_same_text_is_refused_as_such(run):
    """As a run of a version with another rule has it."""
    corpus = run[2]
    holdout = corpus.identity["holdout"]
    older = [{"split": "by file: 2 of 9 files"}, {"holdout": holdout | {"sha256": "0" * 64}}]
    for stored in older:
        with pytest.raises(UserError, match=f"this version holds out another part of it .{next(iter(stored))} was"):
            check_corpus(corpus, corpus.identity | stored)
    without = {name: value for name, value in holdout.items() if name != "sha256"}
    with pytest.raises(UserError, match="this version holds out another part"):
        check_corpus(corpus, corpus.identity | {"holdout": without})


def test_a_checkpoint_of_another_layout_is_refused(run, tmp_path, said):
    asked, config, corpus, states = run
    description = describe(config, corpus)
    del description["layout"]
    with Checkpoints(tmp_path, keep=Keep(2), say=said.append) as checkpoints:
        layers = unstack_layers(states[9].params)
        checkpoints.save(states[9]._replace(params=layers), step=9, data_state={}, description=description)
    for attempt in (lambda: resume(asked, tmp_path, said), lambda: load_run(tmp_path)):
        with pytest.raises(
            UserError,
            match="checkpoint 9 holds its parameters in the layout None, this version reads '2: embedding, head, ",
        ) as error:
            attempt()
        assert "\n" not in str(error.value)


def test_a_field_that_this_version_does_not_know_is_named_with_the_version_that_wrote_it(run, tmp_path, said):
    asked, config, corpus, states = run
    description = describe(config, corpus)
    description["config"]["model"]["num_layer"] = description["config"]["model"].pop("num_layers")
    description["versions"]["oasis_jax"] = "9.8.7"
    with Checkpoints(tmp_path, keep=Keep(2), say=said.append) as checkpoints:
        checkpoints.save(states[9], step=9, data_state={}, description=description)
    for attempt in (lambda: resume(asked, tmp_path, said), lambda: load_run(tmp_path)):
        with pytest.raises(UserError) as error:
            attempt()
        words = str(error.value)
        assert words.startswith("model.num_layer: unknown name 'num_layer' (did you mean 'num_layers'?); allowed: ")
        assert words.endswith("; the config was written by oasis_jax 9.8.7")
        assert "\n" not in words


def test_changed_versions_are_said(run, workdir, said, monkeypatch):
    monkeypatch.setattr("oasis_jax.training.description.platform.python_version", lambda: "3.99.1")
    assert resume(run[0], workdir, said).step == 9
    assert said == [
        f"versions changed since the checkpoint (python {'.'.join(map(str, sys.version_info[:3]))} -> 3.99.1): "
        "losses may differ in their last bits"
    ]


# A run from its checkpoint alone


def test_load_run(run, workdir):
    _, config, corpus, states = run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    loaded = load_run(str(workdir))
    assert (loaded.step, loaded.config, loaded.corpus_identity) == (9, config, corpus.identity)
    assert loaded.tokenizer.identity == corpus.tokenizer.identity
    inputs = jnp.arange(14).reshape(2, 7)
    assert np.array_equal(loaded.model(inputs)[0], build_model(config.model, states[9].params)(inputs)[0])
    assert load_run(workdir, step=6).step == 6
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_load_run_reads_parameters_only(workdir, capsys):
    shutil.rmtree(workdir / "checkpoints" / "9" / "rest")
    manifest.write(workdir / "checkpoints" / "9", 9, late=True)
    assert load_run(workdir).step == 9


def test_load_run_falls_back(workdir, capsys):
    truncate(workdir / "checkpoints" / "9" / "params" / "manifest.ocdbt")
    assert load_run(workdir).step == 6
    assert capsys.readouterr().err.startswith(
        "checkpoint 9 is not whole, step 6 is used instead: params/manifest.ocdbt has "
    )
    assert (workdir / "checkpoints" / "9").is_dir()
    with pytest.raises(UserError, match=r"no whole checkpoint \(9: params/manifest.ocdbt has"):
        load_run(workdir, step=9)


def test_load_run_without_a_run(workdir, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for folder, step, message in [
        (tmp_path / "nowhere", None, "there is no run in"),
        (tmp_path, None, "there is no run in"),
        (tmp_path / "empty", None, "has no checkpoint yet"),
        (workdir, 7, "step 7: .* has no such checkpoint; allowed: 9, 6"),
    ]:
        with pytest.raises(UserError, match=message):
            load_run(folder, step)
    assert not (tmp_path / "nowhere").exists()


def test_what_a_killed_save_left_is_removed_by_training_and_left_by_reading(workdir):
    unfinished = workdir / "checkpoints" / "12.orbax-checkpoint-tmp" / "params"
    unfinished.mkdir(parents=True)
    load_run(workdir)
    assert unfinished.exists()
    with Checkpoints(workdir, keep=Keep(2), say=print) as checkpoints:
        assert not unfinished.exists()
        assert checkpoints.steps() == [9, 6]
