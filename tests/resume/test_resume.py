"""A model with a journal: whatever stops it, what was answered is not computed again, and the answers are the same."""

import pytest
from lm_eval.api.instance import Instance

from lminf_eval.harness.lm import LMInfinite
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import ScoreRequest
from lminf_eval.resume import checkpoint
from lminf_eval.resume.checkpoint import Checkpoints
from lminf_eval.resume.shutdown import STOPPED, ShutdownRequest

TEXTS = ["the grass is green", "the grass is green and the sky is blue", "here we go, there and back again " * 20]
KIND = {"loglikelihood": 0, "loglikelihood_rolling": 1, "generate_until": 2}


def requests(kind: str, **options) -> list[Instance]:
    arguments = {
        "loglikelihood": [(text, " and so on") for text in TEXTS],
        "loglikelihood_rolling": [(text,) for text in TEXTS],
        "generate_until": [(text, {"max_gen_toks": 5, "until": [], **options}) for text in TEXTS],
    }
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments[kind])]


@pytest.fixture(scope="module")
def model(tiny_llama):
    """`model(journal, ...)`: the same tiny model with that journal."""
    folder = tiny_llama()

    def load(journal=None, **options) -> LMInfinite:
        options = {"n_local": 32, "n_global": 4, "dtype": "float32", "device": "cpu"} | options
        return LMInfinite(str(folder), journal=journal and str(journal), **options)

    return load


def info(lm: LMInfinite) -> dict:
    return lm.get_model_info()["lminf"]


def ask(lm: LMInfinite, kind: str, part: slice = slice(None), **options) -> list:
    return getattr(lm, kind)(requests(kind, **options)[part], disable_tqdm=True)


@pytest.mark.parametrize("kind", KIND)
def test_answers_come_from_the_journal_without_the_weights(model, tmp_path, kind):
    first = ask(model(tmp_path), kind)
    again = model(tmp_path, batch_size=3, chunk_size=16, prefix_sharing=False)
    assert ask(again, kind) == first
    assert info(again)["requests_from_journal"] == len(TEXTS)
    assert info(again)["tokens_computed"] == 0
    assert again._runner is None  # nothing was loaded
    undisturbed = ask(model(), kind)
    if kind == "loglikelihood":
        undisturbed, first = ([value for value, _ in answers] for answers in (undisturbed, first))
    assert undisturbed == (first if kind == "generate_until" else pytest.approx(first, rel=1e-6))


def test_kinds_and_options_are_told_apart(model, tmp_path):
    for kind in KIND:
        ask(model(tmp_path), kind)
    other = model(tmp_path)
    ask(other, "generate_until", max_gen_toks=6)
    assert info(other)["requests_from_journal"] == 0
    wider = model(tmp_path, n_local=33)
    ask(wider, "loglikelihood")
    assert info(wider)["requests_from_journal"] == 0


def test_one_process_as_two_and_two_as_one(model, tmp_path):
    whole = ask(model(tmp_path / "one"), "loglikelihood")
    halves = [model(tmp_path / "one") for _ in range(2)]
    parts = [ask(lm, "loglikelihood", slice(rank, None, 2)) for rank, lm in enumerate(halves)]
    assert [parts[i % 2][i // 2] for i in range(len(TEXTS))] == whole
    assert [info(lm)["tokens_computed"] for lm in halves] == [0, 0]

    halves = [model(tmp_path / "two") for _ in range(2)]
    for rank, lm in enumerate(halves):
        ask(lm, "loglikelihood", slice(rank, None, 2))
    one = model(tmp_path / "two")
    assert [a for a, _ in ask(one, "loglikelihood")] == pytest.approx([a for a, _ in whole], rel=1e-6)
    assert info(one)["requests_from_journal"] == len(TEXTS)
    assert info(one)["tokens_computed"] == 0


def test_sampled_answers_are_drawn_once(model, tmp_path):
    first = ask(model(tmp_path), "generate_until", do_sample=True, temperature=2.0)
    again = model(tmp_path)
    assert ask(again, "generate_until", do_sample=True, temperature=2.0) == first
    assert info(again)["requests_from_journal"] == len(TEXTS)


# ---------------------------------------------------------------------- inside a document

LONG = [ScoreRequest([(7 * i) % 97 for i in range(n)], 1) for n in (300, 220, 140)]  # nested
OTHER = ScoreRequest([(5 * i) % 97 for i in range(200)], 1)


@pytest.fixture
def engine(tiny_model, tmp_path):
    """`engine(stop after so many chunks, ...)`: an engine that keeps checkpoints in one folder."""
    from lminf_eval.methods.registry import make
    from lminf_eval.models.equivalence_check import patched_model

    streaming = patched_model(tiny_model(), make(n_local=24, n_global=3))
    forward = streaming.hidden

    def make(chunks: int | None = None, chunk_size: int = 32) -> Engine:
        stop, left = ShutdownRequest(), [chunks]

        def hidden(*args):
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    stop.requested = "SIGTERM"
            return forward(*args)

        streaming.hidden = hidden
        return Engine(streaming, chunk_size, 1, shutdown=stop, checkpoints=Checkpoints(tmp_path, b"this model"))

    yield make
    streaming.restore()


def values(engine: Engine, requests) -> list[list[float]]:
    return [score.log_probs.tolist() for _, score in sorted(engine.score(requests), key=lambda pair: pair[0])]


def test_a_stopped_document_goes_on_where_it_was(engine, tmp_path):
    undisturbed = values(engine(), [*LONG, OTHER])
    stopped = engine(chunks=4)
    with pytest.raises(SystemExit) as left:
        values(stopped, [*LONG, OTHER])
    assert left.value.code == STOPPED
    assert stopped.chunks.computed == 4 * 32
    assert len(list(tmp_path.iterdir())) == 1
    resumed = engine(chunk_size=48)  # another chunk size goes on from there just as well
    found = values(resumed, [*LONG, OTHER])
    assert resumed.chunks.computed == 299 + 199 - 4 * 32
    for ours, theirs in zip(found, undisturbed, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_come_every_so_many_tokens(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("lminf_eval.inference.scoring.EVERY", 64)
    undisturbed = values(engine(), [OTHER])
    scoring = engine()
    saved = []
    monkeypatch.setattr(scoring.checkpoints, "save", lambda position, *_: saved.append(position))
    assert values(scoring, [OTHER]) == undisturbed
    assert saved == [64, 128, 192]
    assert checkpoint.EVERY % 64 == 0


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"\0" * len(data), lambda data: b""])
def test_a_damaged_checkpoint_costs_its_document_alone(engine, tmp_path, damage, caplog):
    undisturbed = values(engine(), [OTHER])
    with pytest.raises(SystemExit):
        values(engine(chunks=3), [OTHER])
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level("WARNING", logger="lm_eval"):
        assert values(engine(), [OTHER]) == undisturbed
    assert "the document is begun again" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_another_request_does_not_take_a_checkpoint(engine, tmp_path):
    with pytest.raises(SystemExit):
        values(engine(chunks=3), [OTHER])
    other = engine()
    values(other, [ScoreRequest(OTHER.tokens, 100)])
    assert other.chunks.computed == 199
