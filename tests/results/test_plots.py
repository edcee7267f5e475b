"""The numbers in the figures, and that the figures can be read."""

import itertools
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colors

from lminf_eval.methods import registry
from lminf_eval.report.figures.curves import hits_by_depth, nll_by_position
from lminf_eval.report.figures.plots import draw_figures
from lminf_eval.report.figures.style import assign_styles, style_of
from lminf_eval.report.load import load_results
from lminf_eval.report.sample_store import SampleStore


def samples_of(files, file, task):
    store = SampleStore(load_results([file]))
    return store.samples(next(iter(store.collection.runs)), task)


def test_nll_by_position_is_the_difference_of_neighbouring_prefixes(lm_eval_files, make_texts):
    nlls = [[3.0, 2.5, 4.0], [3.5, 2.0, 4.5]]
    documents = make_texts(nlls, step=512)
    file = lm_eval_files.write({"pydocs_ppl_2k": documents})
    curve = nll_by_position(samples_of(lm_eval_files, file, "pydocs_ppl_2k"))
    assert curve["start"].tolist() == [0, 512, 1024]
    assert curve["end"].tolist() == [512, 1024, 1536]
    assert curve["nll"].tolist() == pytest.approx([3.25, 2.25, 4.25])
    assert curve["low"].tolist() == pytest.approx([3.0, 2.0, 4.0])
    assert curve["high"].tolist() == pytest.approx([3.5, 2.5, 4.5])
    assert curve["documents"].tolist() == [2, 2, 2]


def test_stretches_that_end_a_few_tokens_apart_are_weighted_by_their_tokens(lm_eval_files):
    documents = [
        {"doc": {"boundaries": [100, 200]}, "resps": ["-300.0", "-500.0"], "nll": 2.5},
        {"doc": {"boundaries": [98, 200]}, "resps": ["-98.0", "-404.0"], "nll": 2.0},
    ]
    file = lm_eval_files.write({"t": documents})
    curve = nll_by_position(samples_of(lm_eval_files, file, "t"))
    assert curve["nll"].tolist() == pytest.approx([398 / 198, 506 / 202])
    assert curve["end"].tolist() == [99, 200]


def test_a_nan_stays_where_it_is(lm_eval_files, make_texts):
    file = lm_eval_files.write({"t": make_texts([[3.0, math.nan, 3.0]])})
    curve = nll_by_position(samples_of(lm_eval_files, file, "t"))
    assert curve["nll"].iloc[0] == 3.0
    assert curve["nll"].iloc[1:].isna().all()


def test_documents_without_boundaries_give_no_curve(lm_eval_files, make_passkeys):
    file = lm_eval_files.write({"passkey_4k": make_passkeys([1, 0])})
    assert nll_by_position(samples_of(lm_eval_files, file, "passkey_4k")).empty


def test_hits_by_depth(lm_eval_files, make_passkeys):
    file = lm_eval_files.write({"passkey_4k": make_passkeys([1, 1, 1, 1, 0, 0, 1, 0, 0, 0])})
    found = hits_by_depth(samples_of(lm_eval_files, file, "passkey_4k"), "acc")
    assert found["depth"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found["hits"].tolist() == [1, 2, 1, 1, 0]
    assert found["documents"].tolist() == [2] * 5


def test_many_depths_are_binned_and_planned_ones_preferred(lm_eval_files):
    documents = [
        {"doc": {"key": str(i), "depth": 0.9, "depth_target": i / 19}, "acc": float(i < 10)} for i in range(20)
    ]
    file = lm_eval_files.write({"passkey_4k": documents})
    found = hits_by_depth(samples_of(lm_eval_files, file, "passkey_4k"), "acc")
    assert found["depth"].tolist() == pytest.approx([0.05 + i / 10 for i in range(10)])
    assert found["documents"].tolist() == [2] * 10
    assert found["hits"].tolist() == [2] * 5 + [0] * 5


METHODS = [
    *("lambda n_local=8192", "full", "window", "streaming", "hf", "vllm"),
    *(f"lambda top_k={k}" for k in range(6)),
]


def test_a_method_has_a_look_of_its_own_and_keeps_it():
    looks = assign_styles(METHODS)
    assert assign_styles(reversed(METHODS)) == looks
    assert len(set(looks.values())) == len(METHODS)
    assert looks["full"] == style_of("full")
    assert looks["lambda n_local=8192"] == style_of("lambda")
    # Without colour, marker and line still tell any two apart.
    for a, b in itertools.combinations(looks.values(), 2):
        assert (a.marker, str(a.line)) != (b.marker, str(b.line))


def test_every_color_can_be_seen_on_white_and_on_dark():
    """Contrast (WCAG 2, relative luminance) of lines; the ink changes with the page."""

    def luminance(color):
        channels = np.array(colors.to_rgb(color))
        linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for name, look in {name: style_of(name) for name in [*registry.METHODS, "hf"]}.items():
        for page in ("#ffffff", "#161616") if name != "full" else ("#ffffff",):
            light, dark = sorted([luminance(look.color), luminance(page)], reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 2.5, (name, page)


@pytest.fixture
def drawn(lm_eval_files, make_passkeys, make_texts):
    for attention, loss, hits in (("lambda", 0.0, [1] * 5), ("full", 5.0, [1, 0, 0, 0, 0])):
        tasks = {f"passkey_{k}k": make_passkeys(hits, k * 1024) for k in (4, 16)}
        for k in (4, 16):
            late = [3.0 if k == 4 else 3.0 + loss] * 4
            tasks[f"pydocs_ppl_{k}k"] = make_texts([[3.0] * 4 + late, [3.1] * 4 + late], step=k * 128)
        lm_eval_files.write(tasks, args={"attention": attention, "pretrained": "org/$mo_del^<b>&"})
    lm_eval_files.write({"passkey_4k": make_passkeys([1] * 5)}, "hf", {"pretrained": "org/$mo_del^<b>&"})
    return {
        plot.name.partition("-")[0]: plot for plot in draw_figures(SampleStore(load_results([lm_eval_files.folder])))
    }


def texts_of(plot) -> list[str]:
    return [text.get_text() for axes in plot.figure.axes for text in [*axes.texts, axes.title]]


def test_nll_figure(drawn):
    axes = drawn["nll"].figure.axes[0]
    by_color = {line.get_color(): line for line in axes.lines}
    line = by_color[style_of("full").color]
    ends = np.arange(1, 9) * 2048
    full = next(line for line in axes.lines if len(line.get_ydata()) == 8 and max(line.get_ydata()) > 7)
    assert full.get_xdata().tolist() == (ends - 1024).tolist()
    assert full.get_ydata().tolist() == pytest.approx([3.05] * 4 + [8.0] * 4)
    assert (full.get_color(), full.get_marker()) == (line.get_color(), style_of("full").marker)
    assert {"lambda", "full", "trained at 8k"} <= set(texts_of(drawn["nll"]))
    assert "org/$mo_del^<b>&" in drawn["nll"].title


def test_perplexity_figure_shows_what_diverged_apart(drawn):
    axes = drawn["perplexity"].figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    told = texts_of(drawn["perplexity"])
    assert {"lambda", "full"} <= set(told)
    assert not [text for text in told if "diverged" in text]
    values = sorted(value for line in axes.lines for value in line.get_ydata() if value > 1)
    assert values[:3] == pytest.approx([math.exp(3.025)] * 3)
    assert values[3] == pytest.approx(math.exp(5.525))


def test_diverged_perplexities_are_marked_above_the_axes(lm_eval_files, make_texts):
    for k, loss in ((2, 3.0), (4, 9.0)):
        lm_eval_files.write({f"pydocs_ppl_{k}k": make_texts([[loss] * 2])}, args={"attention": "full"})
    plot = next(
        p for p in draw_figures(SampleStore(load_results([lm_eval_files.folder]))) if p.name.startswith("perplexity")
    )
    axes = plot.figure.axes[0]
    assert "full diverged" in texts_of(plot)
    above = next(line for line in axes.lines if line.get_markerfacecolor() == "none")
    assert above.get_xdata().tolist() == [4096]
    assert axes.get_ylim()[1] <= 1000
    assert "over 1000" in plot.caption


def test_other_measurements_of_a_method_are_other_lines(lm_eval_files, make_ruler, edit):
    for seed, hits in ((1, [0]), (2, [1])):
        file = lm_eval_files.write({"niah_single_1": make_ruler({4096: [1], 8192: hits})})
        edit(file, config__torch_seed=seed, config__gen_kwargs={"do_sample": True})
    (plot,) = draw_figures(SampleStore(load_results([lm_eval_files.folder])))
    assert {"lambda seeds=random=0 torch=1", "lambda seeds=random=0 torch=2"} == set(texts_of(plot)) - {plot.title, ""}
    assert sorted(line.get_ydata()[-1] for line in plot.figure.axes[0].lines) == [0, 1]


def test_fewer_documents_at_a_greater_length_are_the_same_line(lm_eval_files, make_texts, edit):
    for k, documents in ((2, 4), (4, 2)):
        file = lm_eval_files.write({f"pydocs_ppl_{k}k": make_texts([[3.0]] * documents)})
        edit(file, **{f"configs__pydocs_ppl_{k}k__metadata": {"version": 1.0, "documents": documents}})
    (plot,) = draw_figures(SampleStore(load_results([lm_eval_files.folder])))
    assert [line.get_xdata().tolist() for line in plot.figure.axes[0].lines] == [[2048, 4096]]


def test_heat_map_prints_every_number(drawn):
    panels = [axes for axes in drawn["depth"].figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["full", "hf", "lambda"]
    full, hf, method = ([text.get_text() for text in axes.texts] for axes in panels)
    assert full == ["1/1", "0/1", "0/1", "0/1", "0/1"] * 2
    assert method == ["1/1"] * 10
    assert hf == ["1/1"] * 5
    assert sum(patch.get_hatch() is not None for patch in panels[1].patches) == 5


def test_figures_are_written_as_png_and_svg(drawn, tmp_path):
    for plot in drawn.values():
        png, svg = plot.write(tmp_path)
        assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert "org/$mo_del^<b>&" in "".join(ElementTree.parse(svg).getroot().itertext())
        assert plot.svg() == plot.svg()
    assert len(list(tmp_path.glob("*.svg"))) == len(drawn) == 3
