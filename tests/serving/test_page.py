"""The page of `minigpt serve`, in a real browser, on the real server with two tiny models."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from served import Served
from tracked import changed

from minigpt.data.bpe import BytePairTokenizer
from minigpt.data.tokenizer import WordTokenizer

pytestmark = pytest.mark.slow

KEY = "a key with 'quotes'"
HTML = "<img/src=x/onerror=document.title='hacked'>"
# Names that an object of JavaScript sorts first, or has already.
WORDS = (
    "",
    "[UNK]",
    HTML,
    "10",
    "7",
    "__proto__",
    "constructor",
    "é😀",
    "film",
    "plot",
    "the",
    "i",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ENDED = re.compile(r"\d+ tokens? in ")
MANY = 1000  # tokens, which take a second or more


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, (*BROWSERS, own))), None)
        if not path:
            pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)}, nor Playwright's")
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def serve(folder: Path, *models: str, port: int = 0) -> Served:
    options = [f"--model={model}" for model in models]
    return Served(folder, f"--port={port}", *options, MINIGPT_API_KEY=KEY)


@pytest.fixture(scope="module")
def folder(make_network: Callable[..., Any], tmp_path_factory: Any) -> Path:
    """Where the model directories are."""
    from minigpt.model import directory

    folder: Path = tmp_path_factory.mktemp("page")
    plain = changed().model_dump(mode="json")
    words, pieces = WordTokenizer(WORDS, "published"), BytePairTokenizer(())  # single bytes
    for name, tokenizer, style in (("first", words, "published"), ("second", pieces, "bpe")):
        size = len(tokenizer)
        sections = {name: plain[name] for name in set(directory.SECTIONS) - {"model"}}
        sections["vocabulary"] |= {"style": style, "max_tokens": size}
        network = make_network(vocabulary_size=size, context_length=MANY + 10, num_blocks=1)
        directory.save(folder / name, network, tokenizer, sections)
    return folder


@pytest.fixture(scope="module")
def server(browser: Browser, folder: Path) -> Iterator[Served]:
    server = serve(folder, "first", "second")
    server.wait(lambda: server.get("/health")[0] == 200)
    yield server
    server.process.kill()
    server.process.wait()


def complete(server: Served, **fields: Any) -> Any:
    """Asks for a text as the page does, but not in pieces; returns the only choice."""
    answer = requests.post(
        f"http://127.0.0.1:{server.port}/v1/completions",
        json={"prompt": "the film", "max_tokens": 20, "repetition_penalty": 1.1, **fields},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    )
    answer.raise_for_status()
    (choice,) = answer.json()["choices"]
    return choice


def unlock(page: Page, key: str = KEY) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Unlock").click()


def write(page: Page, tokens: int = 20, prompt: str = "the film") -> Locator:
    """Has a text written; returns its article."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_role("button", name="Write").click()
    article = page.get_by_role("article").first
    expect(article.locator(".outcome")).not_to_be_empty()
    return article


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    yield context
    context.close()


@pytest.fixture
def locked(context: BrowserContext, server: Served) -> Iterator[Page]:
    """The page as it opens. Nothing in it fails, and it loads nothing from elsewhere."""
    page, problems, url = context.new_page(), [], f"http://127.0.0.1:{server.port}/"
    page.on("pageerror", lambda error: problems.append(str(error)))
    # What the server refuses is an error to the console, and shown on the page.
    ours = "Failed to load resource"
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: None if r.url.startswith(url) else problems.append(r.url))
    page.goto(url)
    yield page
    assert [problem for problem in problems if not problem.startswith(ours)] == []


@pytest.fixture
def page(locked: Page) -> Page:
    unlock(locked)
    expect(locked.get_by_text("Ready")).to_be_visible()
    return locked


def test_the_text_and_what_the_model_weighed_at_each_place(page: Page, server: Served) -> None:
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Temperature").fill("100")  # any word comes as often
    page.get_by_label("Top-p").fill("1")
    article = write(page, 60)
    settings = {"max_tokens": 60, "temperature": 100, "seed": 1}
    choice = complete(server, model="first", logprobs=5, **settings)
    assert article.locator(".text").text_content() == "the film" + choice["text"]
    assert "<img/src=x" in choice["text"]
    assert not page.locator("#texts img").count() and page.title() == "minigpt"

    def weighed() -> list[tuple[str, str]]:
        rows = article.locator("tbody tr").all()
        return [(row.locator("th").inner_text(), row.locator("td").inner_text()) for row in rows]

    def expected(index: int) -> list[str]:
        found: dict[str, float] = choice["logprobs"]["top_logprobs"][index]
        return [token or "(end of text)" for token in sorted(found, key=lambda t: -found[t])]

    words = article.locator(".token")
    assert words.count() == 60
    words.nth(3).hover()
    assert [token for token, _ in weighed()] == expected(3)
    place = article.get_by_label("Place in the text")
    place.focus()
    page.keyboard.press("ArrowRight")
    assert [token for token, _ in weighed()] == expected(4)
    chosen = choice["logprobs"]["tokens"][4]
    assert article.locator("tr.chosen th").inner_text() == chosen
    told = place.get_attribute("aria-valuetext") or ""
    assert told.startswith(f"{chosen}. ") and all(f"{a} {b}" in told for a, b in weighed())
    words.nth(0).dispatch_event("click")  # a tap
    assert [token for token, _ in weighed()] == expected(0)


def test_two_models_side_by_side(page: Page, server: Served) -> None:
    page.get_by_label("Compare with").select_option("second")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Daring").check()
    write(page)
    articles = page.get_by_role("article")
    expect(articles).to_have_count(2)
    for index, model in enumerate(("first", "second")):
        article = articles.nth(index)
        expect(article.locator(".outcome")).to_contain_text(ENDED)
        expect(article.get_by_role("heading")).to_have_text(model)
        choice = complete(server, model=model, temperature=1.2, min_p=0.02, seed=7)
        assert article.locator(".text").text_content() == "the film" + choice["text"]
    boxes = [articles.nth(index).bounding_box() for index in range(2)]
    assert boxes[0] and boxes[1] and boxes[0]["y"] == boxes[1]["y"]


def test_the_text_appears_as_it_is_made_and_stops_when_told(page: Page) -> None:
    page.get_by_label("Most tokens").fill(str(MANY))
    page.get_by_label("Prompt").fill("the film")
    # Readers of screens get what is said here, which is not each token.
    page.evaluate(
        """() => {
            window.said = [];
            for (const region of document.querySelectorAll("[role=status]"))
                new MutationObserver(() => said.push(region.textContent))
                    .observe(region, {childList: true, characterData: true, subtree: true});
        }"""
    )
    stop = page.get_by_role("button", name="Stop")
    write = page.get_by_role("button", name="Write")
    for stopping in (stop.click, lambda: page.keyboard.press("Escape")):
        expect(stop).to_have_attribute("aria-disabled", "true")
        write.click()
        expect(page.locator(".token").nth(5)).to_be_visible()
        stopping()
        expect(page.locator(".outcome")).to_have_text(re.compile(r"Stopped after \d+ tokens"))
        assert page.locator(".token").count() < MANY
    assert [text.split(" after")[0] for text in page.evaluate("said")] == [
        *("Writing…", "first: Stopped") * 2
    ]


def test_presets_and_settings(page: Page) -> None:
    temperature = page.get_by_label("Temperature")
    page.get_by_label("Likeliest").check()
    assert temperature.input_value() == "0"
    page.get_by_text("Settings", exact=True).click()
    temperature.fill("200")
    expect(page.get_by_label("Own")).to_be_checked()
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Prompt").fill("the film")
    page.get_by_role("button", name="Write").click()
    expect(temperature).to_be_focused()  # what is wrong is shown, in its section
    assert not page.get_by_role("article").count()
    page.get_by_label("Careful").check()
    before = int(page.get_by_label("Seed").input_value())
    page.get_by_role("button", name="Next seed").click()
    expect(page.locator(".outcome")).to_contain_text(ENDED)
    assert page.get_by_label("Seed").input_value() == str(before + 1)
    assert page.get_by_label("Most tokens").get_attribute("max")


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_the_request_as_code_gives_the_same_text(
    page: Page, context: BrowserContext, language: str
) -> None:
    if language == "curl" and not shutil.which("curl"):
        pytest.skip("there is no curl")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    prompt = "the 'film'\n\"plot\" $HOME \\ `é😀`"
    written = write(page, prompt=prompt).locator(".text").text_content()
    page.get_by_text("This request as code").click()
    page.get_by_label(language).check()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    code = page.evaluate("navigator.clipboard.readText()")
    assert code == page.get_by_label("Code of this request").text_content()
    assert KEY not in code
    command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        env={**os.environ, "MINIGPT_API_KEY": KEY, "PYTHONUTF8": "1"},
        capture_output=True,
        check=True,
        timeout=60,
    )
    text = done.stdout.decode()
    if language == "curl":
        text = json.loads(text)["choices"][0]["text"] + "\n"
    assert prompt + text == f"{written}\n"


def test_it_asks_for_the_key(locked: Page) -> None:
    key = locked.get_by_label("Key", exact=True)
    expect(key).to_be_focused()
    expect(locked.get_by_label("Prompt")).to_be_hidden()
    unlock(locked, "wrong")
    expect(locked.get_by_role("alert")).to_have_text("That is not the key.")
    unlock(locked)
    expect(locked.get_by_label("Prompt")).to_be_focused()
    locked.reload()
    expect(locked.get_by_text("Ready")).to_be_visible()
    expect(key).to_be_hidden()


def test_a_keyboard_is_enough(locked: Page) -> None:
    keyboard = locked.keyboard
    expect(locked.get_by_label("Key", exact=True)).to_be_focused()
    keyboard.type(KEY)
    keyboard.press("Enter")
    expect(locked.get_by_label("Prompt")).to_be_focused()
    keyboard.type("the film")
    reached: list[str] = []
    while "Next seed" not in reached:
        keyboard.press("Tab")
        focused = locked.evaluate(
            """() => { const one = document.activeElement, ring = getComputedStyle(
            one.type === "radio" ? one.parentElement : one);
            return [one.labels?.[0]?.innerText ?? one.innerText, ring.outlineStyle] }"""
        )
        assert focused[1] != "none", f"one can't see that {focused[0]} has the focus"
        reached.append(focused[0])
    assert reached == [
        *("Model", "Compare with", "Balanced", "Settings"),
        *("Most tokens", "Seed", "Write", "Stop", "Next seed"),
    ]
    keyboard.press("Control+Enter")
    expect(locked.locator(".outcome")).to_contain_text(ENDED)
    keyboard.press("Tab")
    expect(locked.get_by_label("Place in the text")).to_be_focused()
    assert locked.locator(".token.current").count() == 1


@pytest.mark.parametrize("width, scheme", [(320, "dark"), (768, "light"), (1280, "dark")])
def test_it_is_accessible_at_any_width(page: Page, width: int, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 700})
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", dark))) < 60) is (scheme == "dark")
    for section in ("Settings", "This request as code"):
        page.get_by_text(section, exact=True).click()
    page.get_by_label("Compare with").select_option("second")
    write(page)
    for place in page.get_by_label("Place in the text").all():
        place.focus()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.getAnimations().length") == 0
    found = Axe().run(page)
    assert not found.violations_count, found.generate_report()
    assert found.response["passes"]


def test_it_says_that_the_server_is_away_and_comes_back(
    page: Page, server: Served, folder: Path
) -> None:
    page.get_by_label("Prompt").fill("the film")
    page.get_by_label("Most tokens").fill(str(MANY))
    page.get_by_role("button", name="Write").click()
    expect(page.locator(".token").nth(5)).to_be_visible()
    server.process.kill()
    expect(page.locator(".outcome")).to_contain_text("The server went away after")
    expect(page.get_by_text("The server is away.")).to_be_visible()
    text = page.locator(".text").text_content()
    found = Axe().run(page)
    assert not found.violations_count, found.generate_report()
    server.process.wait()
    again = serve(folder, "second", port=server.port)
    try:
        expect(page.get_by_text("The server is loading its model")).to_be_visible(timeout=60_000)
        expect(page.get_by_text("Ready")).to_be_visible(timeout=60_000)
        assert page.locator(".text").text_content() == text
        expect(page.get_by_label("Model")).to_have_value("second")
        write(page)
        expect(page.locator(".outcome")).to_contain_text(ENDED)
    finally:
        again.process.kill()
        again.process.wait()
