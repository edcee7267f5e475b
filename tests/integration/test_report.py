"""Real runs of `hf` and `lminf`, made into a table and a page by the real commands, and the page used in a browser."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OLD = Path(__file__).parents[1] / "results" / "data" / "lm_eval_0.4.9"
METHODS = ("attention=lambda,n_local=48,n_global=4", "attention=full")
# Commands of lm-eval, one after the other in one process.
SEVERAL = """
import json, sys
from lm_eval.__main__ import cli_evaluate

for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    cli_evaluate()
"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("report-command")]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def lminf(folder: Path, *arguments: str) -> str:
    return run(folder, "-c", "from lminf_eval.cli.app import app; app()", *arguments).stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_llama) -> Path:
    """A folder with `out/`: one run of hf and two of lminf, at a length past the 64 that the model was trained at."""
    folder = tmp_path_factory.mktemp("report")
    model = tiny_llama()
    metadata = json.dumps({"length": 512, "documents": 10, "depths": 5, "buckets": 8})
    commands = [
        [
            *("run", "--model", backend, "--model_args", f"pretrained={model},dtype=float32{args}"),
            *("--device", "cpu", "--tasks", "passkey_4k,pydocs_ppl_2k", "--limit", "6"),
            *("--metadata", metadata, "--gen_kwargs", "max_gen_toks=8", "--log_samples", "--output_path", "out"),
        ]
        for backend, args in (("hf", ""), *(("lminf", f",{method}") for method in METHODS))
    ]
    run(folder, "-c", SEVERAL, json.dumps(commands))
    return folder


def recorded(results: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in results.glob("out/**/results_*.json")]


def test_hf_lminf_and_the_old_format_in_one_table(results):
    shown = lminf(results, "table", "out", str(OLD), "--format", "csv", "--metric", "nll,acc", "--rows", "model,method")
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(shown)) if row["model"] != "tiny-llama"}
    assert set(rows) == {"hf", "full", "lambda n_local=48 n_global=4"}
    assert {row["model"] for row in csv.DictReader(io.StringIO(shown))} > {"tiny-llama"}
    for raw in recorded(results):
        method = raw["config"]["model_args"].get("attention", "hf")
        row = next(row for name, row in rows.items() if name.startswith(method))
        assert float(row["pydocs_ppl nll ↓ 512"]) == raw["results"]["pydocs_ppl_2k"]["nll,none"]
        assert "past trained length" in row["pydocs_ppl nll ↓ 512 remark"]


@pytest.fixture(scope="module")
def page(results) -> Path:
    lminf(results, "report", "out", str(OLD), "-o", "report.html", "--figures", "figures")
    assert {file.suffix for file in results.glob("figures/nll-*")} == {".png", ".svg"}
    return results / "report.html"


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium that notes every request and console line, and saves downloads into `tmp_path`."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-sandbox"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    yield browser
    browser.quit()


def resize(browser, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def column(browser, number: int) -> list[str]:
    script = "return [...document.querySelectorAll('#all tbody tr')].filter(row => !row.hidden)"
    return browser.execute_script(f"{script}.map(row => row.cells[{number}].textContent)")


def wait_for(file: Path, browser) -> bytes:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20).until(lambda _: file.exists() and file.stat().st_size)
    return file.read_bytes()


def test_the_page_in_a_browser(page, results, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    resize(browser, 1280)
    browser.get(page.as_uri())
    whole = len(column(browser, 0))
    assert whole == 3 * 6 + 6  # three runs of six metrics, and the old file's

    # Filtering, and a value against lm-eval's own file.
    selects = {
        select.find_element(By.XPATH, "..").text.split("\n")[0]: Select(select)
        for select in browser.find_elements(By.CSS_SELECTOR, "#filters select")
    }
    assert list(selects) == ["model", "method", "task", "length", "metric"]
    selects["method"].select_by_visible_text("lambda n_local=48 n_global=4")
    selects["metric"].select_by_visible_text("nll")
    assert column(browser, 1) == ["lambda n_local=48 n_global=4"]
    assert browser.find_element(By.ID, "shown").text == f"1 of {whole}"
    cell = browser.execute_script("return document.querySelector('#all tbody tr:not([hidden])').cells[5].dataset.value")
    ours = next(raw for raw in recorded(results) if raw["config"]["model_args"].get("attention") == "lambda")
    assert float(cell) == ours["results"]["pydocs_ppl_2k"]["nll,none"]
    selects["method"].select_by_visible_text("all")
    assert len(column(browser, 0)) == 3
    selects["metric"].select_by_visible_text("all")

    # Sorting, by keyboard.
    heading = browser.find_element(By.XPATH, "//table[@id='all']//th[normalize-space()='value']/button")
    values = "return [...document.querySelectorAll('#all tbody tr')].map(row => Number(row.cells[5].dataset.value))"
    before = browser.execute_script(values)
    heading.send_keys(Keys.ENTER)
    assert browser.execute_script(values) == sorted(before)
    assert heading.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    heading.send_keys(Keys.SPACE)
    assert browser.execute_script(values) == sorted(before, reverse=True)

    # The theme.
    background = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(background)
    browser.find_element(By.ID, "theme").click()
    dark = browser.execute_script(background)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(22, 22, 22)")
    assert browser.find_element(By.ID, "theme").text == "Light"

    # Downloads: the data and a figure.
    browser.find_element(By.LINK_TEXT, "results.csv").click()
    saved = list(csv.DictReader(io.StringIO(wait_for(tmp_path / "results.csv", browser).decode())))
    assert len(saved) == whole
    figure = browser.find_element(By.TAG_NAME, "figure")
    name = figure.get_attribute("id")
    figure.find_element(By.CSS_SELECTOR, "[data-save=svg]").click()
    figure.find_element(By.CSS_SELECTOR, "[data-save=png]").click()
    assert wait_for(tmp_path / f"{name}.svg", browser).startswith(b"<svg")
    assert wait_for(tmp_path / f"{name}.png", browser).startswith(b"\x89PNG")

    # A link into a closed section opens it.
    browser.find_element(By.LINK_TEXT, "run1").click()
    assert browser.execute_script("return document.getElementById('run1').open")

    assert [entry["message"] for entry in browser.get_log("browser")] == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith(("data:", "blob:"))} == {page.as_uri()}


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window_and_reads_without_javascript(page, browser, width):
    resize(browser, width)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(page.as_uri())
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    shown = browser.execute_script("return document.body.innerText")
    for text in (
        "pydocs_ppl token_perplexity ↓",
        "lambda n_local=48 n_global=4",
        "Loss against position",
        "All results",
    ):
        assert text in shown
    assert not browser.execute_script("return document.getElementById('filters').checkVisibility()")
    assert browser.execute_script("return document.querySelectorAll('figure svg').length") >= 2
