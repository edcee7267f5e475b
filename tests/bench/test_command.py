"""The whole command: what it writes, that it goes on after Ctrl-C, and what it refuses to write over."""

import json
import re

import pytest

from lminf_eval.bench import FORMAT, run
from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.bench.cases import decode, prefill
from lminf_eval.bench.run import run_bench
from lminf_eval.errors import UsageError


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    """The machine's ceilings are not what is tested here."""
    from lminf_eval.bench.record import Record
    from lminf_eval.bench.roofline import Work

    record = Record(
        "ceilings",
        {},
        {"matrix product": [1.0, 2.0], "copy": [1.0, 2.0]},
        work={"matrix product": Work(1e11), "copy": Work(0.0, 1e10)},
    )
    monkeypatch.setattr(run.hardware_limits, "measure_hardware", lambda *args: record)


def read(file):
    return json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_file_holds_everything(make_options, tmp_path, capsys):
    file = tmp_path / "new" / "bench.json"
    assert run_bench(make_options(), file) == 0
    raw = read(file)
    assert raw["format"] == FORMAT
    assert raw["finished"] is True
    assert raw["options"]["lengths"] == [48, 96]
    assert raw["options"]["vs"] is False  # the format's key of --baselines
    assert [record["rated"] for record in raw["records"]] == [False] * 7
    assert {"python", "torch", "transformers", "lm-eval", "lminf-eval"} == raw["versions"].keys()
    assert all(raw["versions"].values())
    assert raw["machine"].keys() == {"system", "cpu", "cores", "threads", "memory_bytes", "gpu", "cuda"}
    assert raw["model"]["dtype"] == "float32"
    assert (raw["model"]["layers"], raw["model"]["vocab"]) == (2, 512)
    assert [record["case"] for record in raw["records"]] == ["ceilings", *["prefill"] * 2, *["decode"] * 4]
    for record in raw["records"][1:]:
        for side, values in record["values"].items():
            assert len(values) == 2
            assert record["summary"]["sides"][side]["median"] == pytest.approx(sum(values) / 2)
            floor = max(record["work"][side]["flops"] / 1e11, record["work"][side]["bytes"] / 1e10)
            assert record["summary"]["reached"][side] == pytest.approx(floor / (sum(values) / 2))
        first, other = record["values"].values()
        ratio = sum(b / a for a, b in zip(first, other, strict=True)) / 2
        assert next(iter(record["summary"]["ratios"].values()))["median"] == pytest.approx(ratio)
    out, err = capsys.readouterr()
    assert "hf / lambda" in out
    assert "plain / lambda" in out
    assert "100 GFLOP/s (matrix product), 10.0 GB/s (copy)" in out
    assert "6 measurements, about" in err
    assert re.search(r"2/6 prefill n_local=32, length=96: lambda [\d.,]+ tokens/s, hf [\d.,]+ tokens/s\n", err)
    assert list(file.parent.iterdir()) == [file]


def test_ctrl_c_leaves_what_was_measured_and_the_same_command_goes_on(make_options, tmp_path, monkeypatch, capsys):
    file, real, ran = tmp_path / "bench.json", decode.measure_decode, []

    def count(*args):
        ran.append(args[1]["context"])
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(decode, "measure_decode", count)
    assert run_bench(make_options(), file) == 130
    raw = read(file)
    assert not raw["finished"]
    assert [record["case"] for record in raw["records"]] == ["ceilings", "prefill", "prefill", "decode"]
    out, err = capsys.readouterr()
    assert "hf / lambda" in out  # what there is is shown
    assert f"stopped: {file} holds 3 of 6 measurements; the same command resumes" in err
    monkeypatch.setattr(prefill, "measure_prefill", lambda *args: pytest.fail("it was measured before"))
    assert run_bench(make_options(), file) == 0
    after = read(file)
    assert after["finished"]
    assert after["records"][:4] == raw["records"]
    assert ran == [0, 32, 32, 48, 96]
    assert "holds 4 measurements of this bench; resuming" in capsys.readouterr().err


def test_a_finished_bench_is_measured_anew(make_options, tmp_path):
    file = tmp_path / "bench.json"
    options = make_options(cases="prefill", lengths="48")
    assert run_bench(options, file) == 0
    before = read(file)["records"][1]["values"]
    assert run_bench(options, file) == 0
    assert read(file)["records"][1]["values"] != before


def test_another_bench_is_not_written_over(make_options, tmp_path, monkeypatch):
    file = tmp_path / "bench.json"
    run_bench(make_options(cases="prefill", lengths="48"), file)
    before = file.read_bytes()
    monkeypatch.setattr(BenchmarkModel, "model", property(lambda self: pytest.fail("weights were read")))
    with pytest.raises(UsageError, match=r"holds another bench \(options lengths: \[48\], now \[64\]\)"):
        run_bench(make_options(cases="prefill", lengths="64"), file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{}", '{"results": {}}', "[1]", "\x00"])
def test_nor_is_what_is_no_bench(make_options, tmp_path, content):
    file = tmp_path / "bench.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"bench.json exists and is not a bench file: choose another one"):
        run_bench(make_options(), file)
    assert file.read_text() == content


def test_an_output_that_cannot_be_written(make_options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output .*bench.json: (Not a directory|File exists)"):
        run_bench(make_options(), tmp_path / "file" / "bench.json")


def test_weights_that_do_not_fit_are_refused_before_they_are_made(make_options, tmp_path, monkeypatch):
    monkeypatch.setattr("lminf_eval.bench.benchmark_model.available_memory", lambda device: 1000)
    with pytest.raises(UsageError, match=r"the weights: needs 427 kB, 1 kB are free"):
        run_bench(make_options(), tmp_path / "bench.json")


def test_a_model_that_cannot_be_run(make_options, tmp_path, tiny_llama):
    folder = tiny_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UsageError, match="mamba"):
        run_bench(make_options(shape="", pretrained=str(folder)), tmp_path / "bench.json")


def test_weights_that_cannot_be_read(make_options, tmp_path, tiny_llama):
    folder = tiny_llama()
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UsageError, match="its weights can't be read"):
        run_bench(make_options(shape="", pretrained=str(folder)), tmp_path / "bench.json")
    assert not list(tmp_path.glob("bench.json*"))
