"""The page in a browser without a window: what a person does there, and that nothing leaves the server's address."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from served import KEY, Served

STORY = "Tell me a story about a dog named Max."
ANSWER_MS = 60_000


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # tests may run as root
        yield found
        found.close()


class Watched:
    """A page, with what went wrong on it and where it asked."""

    def __init__(self, browser: Browser, served: Served, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.told: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda m: self.told.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.told.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(re.sub(r"(?<=\w)/.*", "", request.url)))
        self.base = served.base
        self.page.goto(served.base)
        expect(self.page.locator("#model")).to_have_text("ktrans: set the API key in Settings")
        assert len(self.told) == 1 and "401" in self.told.pop()  # the browser's own line; all else is a mistake
        change(self.page, key=KEY, temperature="0")
        expect(self.page.locator("#model")).to_have_text("tiny")

    def close(self) -> None:
        self.context.close()
        assert self.told == []
        assert self.asked <= {self.base, "data:,"}  # the icon


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page on a desktop, with the key; at its end nothing was wrong, and nobody else was asked."""
    found = Watched(browser, served)
    yield found.page
    found.close()


def change(page: Page, **fields: str) -> None:
    """Fill in fields of the settings, by their ids."""
    page.get_by_role("button", name="Settings").click()
    for name, value in fields.items():
        page.locator(f"dialog #{name}").fill(value)
    page.get_by_role("button", name="Done").click()


def say(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def answered(page: Page, count: int = 1) -> str:
    """The last answer, once there are so many and it is whole."""
    expect(page.locator("#again")).to_be_visible(timeout=ANSWER_MS)
    expect(page.locator(".turn.assistant")).to_have_count(count)
    return page.locator(".turn.assistant").last.inner_text()


def test_an_answer_is_streamed_and_counted(page: Page) -> None:
    page.evaluate(
        "window.seen = []; new MutationObserver(() => { const t = document.querySelector('.turn.assistant');"
        " if (t) seen.push(t.innerText.length); }).observe(document.body, {childList: true, subtree: true});"
    )
    say(page, STORY)
    text = answered(page)
    assert "Max" in text and re.search(r"first token [\d.]+ s, \d+ tokens, [\d.]+ tok/s; prompt \d+", text)
    assert len(set(page.evaluate("seen"))) > 10  # it grew before one's eyes
    assert page.get_by_label("Message").input_value() == ""
    say(page, "Thank you.")
    assert re.search(r"; prompt \d+, \d+ cached", answered(page, 2))  # what was said before went along


def test_stop_by_button_and_by_key(page: Page, served: Served) -> None:
    for stop in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        page.get_by_role("button", name="New").click()
        say(page, STORY)
        expect(page.locator(".turn.assistant p")).to_be_visible()
        stop()
        text = answered(page)
        assert text.endswith("stopped") and "tok/s" not in text
        assert served.idle()
        expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_a_reload_keeps_the_conversation_and_the_settings(page: Page) -> None:
    say(page, "What is the capital of France?")
    text = answered(page)
    page.reload()
    assert answered(page) == text
    expect(page.locator(".turn.user")).to_have_text("What is the capital of France?")
    say(page, STORY)  # with the key that was given before
    expect(page.locator(".turn.assistant p").nth(1)).to_be_visible()
    page.reload()  # in the middle of an answer
    assert answered(page, 2)
    page.get_by_role("button", name="New").click()
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)


def test_regenerate_asks_again(page: Page) -> None:
    change(page, temperature="1", seed="1", max_tokens="24")
    say(page, STORY)
    first = answered(page)
    change(page, seed="2")
    page.get_by_role("button", name="Regenerate").click()
    second = answered(page)
    assert first.split("\n")[0] != second.split("\n")[0]
    expect(page.locator(".turn.user")).to_have_count(1)


def test_settings_reach_the_model(page: Page) -> None:
    change(page, system="You are a pirate.", max_tokens="5", top_p="0.5", top_k="4", min_p="0.1", seed="7")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, STORY)
    body = sent.value.post_data_json
    expected = {"temperature": 0, "top_p": 0.5, "top_k": 4, "min_p": 0.1, "seed": 7, "max_tokens": 5}
    assert {k: v for k, v in body.items() if k in expected} == expected
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert " 5 tokens" in answered(page)


def test_what_is_refused_is_told(browser: Browser, served: Served) -> None:
    watched = Watched(browser, served)
    page = watched.page
    say(page, "word " * 5000)
    expect(page.locator(".turn .error")).to_contain_text("the context holds 1024", timeout=ANSWER_MS)
    assert len(watched.told) == 1 and "400" in watched.told.pop()  # the browser's own line
    page.get_by_role("button", name="New").click()
    say(page, STORY)
    assert "Max" in answered(page)
    watched.close()


def test_code_is_shown_and_copied(browser: Browser, served: Served) -> None:
    watched = Watched(browser, served, permissions=["clipboard-read", "clipboard-write"])
    page = watched.page
    said = [
        {"role": "user", "content": "<b>hello</b>"},
        {"role": "assistant", "content": "Use `x` **now**:\n```python\nprint('<hi>')\n```\nDone.", "reasoning": "So."},
    ]
    page.evaluate("said => { turns = said; keep(); draw(); }", said)
    expect(page.locator(".turn.user")).to_have_text("<b>hello</b>")
    assert page.locator("pre code").inner_text() == "print('<hi>')"
    assert page.locator("p code").inner_text() == "x" and page.locator("strong").inner_text() == "now"
    expect(page.locator("details summary")).to_have_text("Thoughts")
    page.locator("pre button").click()
    expect(page.locator("pre button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "print('<hi>')"
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")
    page.get_by_role("button", name="Copy").last.click()  # the answer's, as over plain HTTP
    page.evaluate("delete navigator.clipboard")
    assert page.evaluate("navigator.clipboard.readText()") == said[1]["content"]
    watched.close()


def luminance(page: Page) -> float:
    """Of the background, 0 to 1."""
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light(browser: Browser, served: Served, scheme: Any) -> None:
    watched = Watched(browser, served, color_scheme=scheme)
    page, is_dark = watched.page, scheme == "dark"
    assert (luminance(page) < 0.5) == is_dark
    page.get_by_role("button", name="Dark or light").click()
    assert (luminance(page) < 0.5) != is_dark
    page.reload()
    assert (luminance(page) < 0.5) != is_dark  # what was chosen stays
    watched.close()


def test_a_phone(browser: Browser, served: Served) -> None:
    """Nothing is wider than the window in either tab, and buttons are large enough for a finger."""
    watched = Watched(browser, served, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page = watched.page
    say(page, "Write a Python function that adds two numbers.")
    answered(page)
    for tab in ("Machine", "Chat"):
        page.get_by_role("tab", name=tab).tap()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for button in page.locator("header button").all():
            box = button.bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 28
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport()
    watched.close()


def tile(page: Page, name: str) -> str:
    return page.locator("#tiles div", has=page.get_by_text(name, exact=True)).locator("b").inner_text()


def test_the_machine_tab_is_alive(page: Page) -> None:
    say(page, STORY)
    page.get_by_role("tab", name="Machine").click()
    expect(page.locator("#page")).to_contain_text("decode")
    expect(page.locator("#page")).to_contain_text("L1.experts")
    expect(page.locator("#tiles")).to_contain_text("CPU experts busy")
    before = int(tile(page, "tokens written"))
    page.get_by_role("tab", name="Chat").click()
    answered(page)
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_role("tab", name="Machine").click()
    expect(page.locator("#line-cpu")).to_have_attribute("d", re.compile("M.*L"), timeout=10_000)
    expect(page.locator("#line-tokens")).to_have_attribute("d", re.compile("M.*L"))
    assert int(tile(page, "tokens written")) > before
    assert re.fullmatch(r"\d+ %", tile(page, "CPU experts busy"))
    assert re.fullmatch(r"[\d.]+ GB/s", tile(page, "experts read"))
    expect(page.locator("#legend-gpu")).to_be_hidden()  # there is no GPU here
    page.get_by_role("tab", name="Chat").click()
    answered(page)


def test_while_the_model_loads(browser: Browser) -> None:
    """Both tabs say how far it is, and come to life by themselves."""
    served = Served()
    context = browser.new_context(extra_http_headers={"authorization": f"Bearer {KEY}"})
    page = context.new_page()
    page.goto(served.base)
    expect(page.locator("#model")).to_contain_text("loading: reading the model")
    page.get_by_role("tab", name="Machine").click()
    expect(page.locator("#page")).to_have_text("loading: reading the model, 0 of 1")
    served.go.set()
    assert served.loaded.wait(120)
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#page")).to_contain_text("L1.experts")
    context.close()


def test_keys(page: Page) -> None:
    box = page.get_by_label("Message")
    box.fill("one")
    box.press("Shift+Enter")
    box.type("two")
    assert box.input_value() == "one\ntwo"
    box.press("Enter")
    expect(page.locator(".turn.user")).to_have_text("one\ntwo")
    answered(page)
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".turn")).to_have_count(0)
    expect(box).to_be_focused()
