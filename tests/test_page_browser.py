"""The page in a headless Chromium: what it shows after each key is the library's; it works without a mouse,
on three sizes of screen, in the dark and without motion."""

import math
from types import SimpleNamespace

import browser
import pytest
import torch

from dpo_minimal.__main__ import main
from dpo_minimal.closed_form import kl_divergence, optimal_logps, soft_value
from dpo_minimal.experiments.page import command, frames, words
from dpo_minimal.losses import dpo_loss

pytest.importorskip("selenium.webdriver", reason="selenium is missing: requirements-bench.txt")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.slow
SIZES = {"projector": (1920, 1080), "laptop": (1400, 900), "telephone": (390, 844)}
BETA = command.OPTIONS["options"]["beta"].default
SEED = command.OPTIONS["options"]["seed"].default


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> SimpleNamespace:
    """The page as users get it, with what it was made of: url, frames, words."""
    made = SimpleNamespace(frames=frames.world_frames(BETA, SEED), words=words.word_frames(BETA, SEED))
    file = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:  # not computed twice
        patch.setattr(command, "world_frames", lambda *_: made.frames)
        patch.setattr(command, "word_frames", lambda *_: made.words)
        assert main(["page", "--output", str(file)]) == 0
    made.url = file.as_uri()
    return made


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = browser.start(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, site):
    """The page anew, as on a projector; at the end of each test its console must be empty."""
    browser.resize(driver, *SIZES["projector"])
    driver.get(site.url)
    yield driver
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert browser.complaints(driver) == []


def emulate(page, feature: str, value: str) -> None:
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": feature, "value": value}]})


def press(page, element: str, *keys: str) -> None:
    page.find_element(By.ID, element).send_keys(*keys)


def number(text: str) -> float:
    return float(text.replace("\u2212", "-").removeprefix("β = ").removeprefix("step ").rstrip("%"))


def told(page, name: str) -> float:
    """A number that stands on the page by name."""
    return number(page.find_element(By.CSS_SELECTOR, f"[data-show={name}]").text)


def near(value: float, digits: int = 3):
    """Shown with so many digits after the point, of a value that the file has with six in all."""
    return pytest.approx(value, abs=0.5 * 10**-digits + 1e-6 * abs(value))


def cells(page, table: str) -> list[list[str]]:
    """The texts of a table's rows, the first of each its header; what is drawn has none."""
    rows = page.find_elements(By.CSS_SELECTOR, f"#{table} tr")
    return [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td:not(.bar)")] for row in rows]


def probability(text: str):
    """One digit after the point of a percentage, or "<0.1%"."""
    return pytest.approx(0, abs=0.0005) if text == "<0.1%" else pytest.approx(number(text) / 100, abs=0.00051)


# --------------------------------------------------------------------------------- numbers, by keyboard


def test_it_opens_alone(page):
    """Nothing is loaded but the file itself; five panels, and no word of a missing number."""
    browser.requested(page)  # up to now
    page.refresh()
    assert browser.requested(page) == []
    assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert len(page.find_elements(By.CSS_SELECTOR, "section > h2")) == 5
    text = page.find_element(By.TAG_NAME, "body").text
    assert not [word for word in ("undefined", "NaN", "null", "Infinity", "{{") if word in text]
    assert all(e.text for e in page.find_elements(By.CSS_SELECTOR, "[data-show]"))


@pytest.mark.parametrize(("keys", "octave"), [
    ([], 0), ([Keys.HOME], -4), ([Keys.END], 5), ([Keys.ARROW_RIGHT] * 6, 1), ([Keys.ARROW_LEFT] * 9, -1.5),
])  # fmt: skip
def test_beta_moves_the_optimum(page, keys, octave):
    """Both panels of beta, from the first one's slider, against Eq. 4 and the frontier by the library."""
    world, beta = frames.page_world(SEED), BETA * 2**octave
    press(page, "beta", *keys)
    tables = world.ref_logps, world.rewards
    star = optimal_logps(*tables, beta=beta)
    assert told(page, "beta") == pytest.approx(beta, rel=0.005)  # three significant digits
    rows = cells(page, "optimum-bars")
    assert [row[0] for row in rows] == list(world.completions[0])
    for y, row in enumerate(rows):
        assert number(row[1]) == near(world.rewards[0, y].item(), 2)
        assert world.ref_logps[0, y].exp().item() == probability(row[2])
        assert star[0, y].exp().item() == probability(row[3])
    divergence, reward = (
        kl_divergence(star, world.ref_logps).item(),
        (star.exp() * world.rewards).sum().item(),
    )
    for panel in ("optimum", "frontier"):
        assert told(page, f"{panel}-kl") == near(divergence) and told(page, f"{panel}-reward") == near(reward)
    assert told(page, "frontier-value") == near(soft_value(*tables, beta=beta).item())
    best = world.completions[0][star[0].argmax()]
    assert page.find_element(By.CSS_SELECTOR, "[data-show=optimum-mode]").text == f"“{best}”"
    spoken = page.find_element(By.ID, "beta").get_attribute("aria-valuetext")
    assert best in spoken and page.find_element(By.ID, "beta-again").get_attribute("aria-valuetext") == spoken
    width = page.find_element(By.CSS_SELECTOR, "#optimum-bars td.bar").size["width"]
    for bar, probability_of in zip(
        page.find_elements(By.CSS_SELECTOR, "#optimum-bars i"), star[0].exp().tolist()
    ):
        # three pixels: the border of the cell, and rounding
        assert bar.rect["width"] == pytest.approx(width * probability_of, abs=3)


@pytest.mark.parametrize(
    "keys", [[], [Keys.ARROW_RIGHT] * 7, [Keys.END], [Keys.END, Keys.ARROW_LEFT, Keys.ARROW_LEFT]]
)
def test_the_step_moves_the_training(page, site, keys):
    """Policy, error and bound of the frame that the keys lead to."""
    press(page, "step-again", *keys)  # the slider of panel 3 moves panel 2 too
    last = len(frames.STEPS) - 1
    place = {0: 0, 7: 7, 1: last, 3: last - 2}[len(keys)]
    frame = site.frames["training"][place]
    assert told(page, "step") == frames.STEPS[place]
    for row, now, target in zip(
        cells(page, "training-bars"), frame["probs"], site.frames["target"], strict=True
    ):
        assert now == probability(row[1]) and target == probability(row[2])
    for name, value in (("error", frame["distance"]), ("bound", frame["bound"])):
        text = page.find_element(By.CSS_SELECTOR, f"[data-show={name}]").text
        if value is None:
            assert text == "none yet"
        else:  # 0.123, or 1.2e-5
            assert number(text) == (near(value) if value >= 0.001 else pytest.approx(value, rel=0.05))


def test_a_pair_and_its_pulls(page, site):
    """Chosen by keyboard: shares, weights and pulls of both labels, by dpo_loss on that step's policy."""
    world = frames.page_world(SEED)
    press(page, "pair", Keys.HOME, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    press(page, "step", Keys.END)
    i, j = 0, 3  # the third pair
    logps = torch.tensor(site.frames["training"][-1]["probs"], dtype=torch.float64).log()
    rows = cells(page, "pull-rows")
    for row, (w, l) in zip(rows, ((i, j), (j, i)), strict=True):
        logps_of_pair = (table[y].unsqueeze(0) for table in (logps, world.ref_logps[0]) for y in (w, l))
        weight = dpo_loss(*logps_of_pair, beta=BETA).gradient_weights.item()
        chance = torch.sigmoid(world.rewards[0, w] - world.rewards[0, l]).item()
        assert row[0] == f"“{world.completions[0][w]}” is better"
        assert chance == probability(row[1]) and number(row[2]) == near(weight)
        assert number(row[3]) == near(chance * weight)
    assert rows[0][3] == rows[1][3]  # as the page says: at the end both pulls are equal
    assert told(page, "margin") == near((world.rewards[0, i] - world.rewards[0, j]).item(), 2)
    bars = page.find_elements(By.CSS_SELECTOR, "#pull-bars i")
    assert abs(bars[0].size["width"] - bars[1].size["width"]) <= 2


def test_the_tokens_of_a_pair(page, site):
    """Each part as computed; those that are shown sum to the margin that is shown, up to their rounding."""
    for pair, keys in ((0, []), (3, [Keys.ARROW_DOWN] * 3)):
        press(page, "text", Keys.HOME, *keys)
        press(page, "word-step", Keys.END)
        made = site.words["pairs"][pair]
        frame, parts = made["frames"][-1], []
        for side, name in enumerate(("chosen", "rejected")):
            shown = [item.text.split("\n") for item in page.find_elements(By.CSS_SELECTOR, f"#{name} li")]
            tokens = [token.strip() for token in made[name][:-1]] + ["(end)"]
            assert [text for text, _ in shown] == tokens
            for (_, value), part in zip(shown, frame["parts"][side], strict=True):
                assert number(value) == near(part, 2)
            parts += [number(value) for _, value in shown]
            assert told(page, f"{name}-sum") == near(frame["sums"][side], 2)
        assert told(page, "word-margin") == near(frame["margin"], 2)
        assert math.fsum(parts) == pytest.approx(told(page, "word-margin"), abs=0.005 * (len(parts) + 1))
        assert told(page, "gap") == near(made["gap"], 2) and told(page, "word-weight") == near(
            frame["weight"]
        )
    press(page, "word-step", Keys.HOME)
    assert told(page, "word-margin") == 0 and told(page, "word-weight") == near(BETA / 2)


# ------------------------------------------------------------------------------- controls and appearance


def test_the_point_can_be_dragged(page, site):
    """To the right along the curve: beta falls, to the frame whose point is nearest the pointer."""
    chart = page.find_element(By.ID, "frontier-chart")
    page.execute_script("arguments[0].scrollIntoView()", chart)
    places = page.execute_script(
        "const [px, py] = state.places; return data.optimum.map(f => [px(f.kl), py(f.reward)]);"
    )
    middle = [chart.size["width"] / 2, chart.size["height"] / 2]
    start, goal = (places[k] for k in (24, 9))
    from_middle = [[int(at[0] - middle[0]), int(at[1] - middle[1])] for at in (start, goal)]
    drag = ActionChains(page).move_to_element_with_offset(chart, *from_middle[0]).click_and_hold()
    drag.move_to_element_with_offset(chart, *from_middle[1]).release().perform()
    assert told(page, "frontier-kl") == near(site.frames["optimum"][9]["kl"])
    assert page.find_element(By.ID, "beta").get_attribute("value") == "9"


def test_play_moves_until_it_is_paused_or_at_the_end(page):
    """By keyboard; without motion it goes to the end at once."""
    button = page.find_element(By.CSS_SELECTOR, "#training [data-play]")
    button.send_keys(Keys.ENTER)
    assert button.text == "Pause"
    for _ in range(100):
        if told(page, "step") > 2:
            break
    button.send_keys(Keys.SPACE)
    assert button.text == "Play" and 2 < told(page, "step") < frames.STEPS[-1]
    emulate(page, "prefers-reduced-motion", "reduce")
    button.send_keys(Keys.ENTER)
    assert button.text == "Play" and told(page, "step") == frames.STEPS[-1]


def test_the_tab_key_leads_to_everything_in_order(page):
    """Each control is reached once, has a name, and shows by an outline that it has the focus."""
    seen = []
    for _ in range(30):
        ActionChains(page).send_keys(Keys.TAB).perform()
        active = page.switch_to.active_element
        if active.tag_name == "body":
            break
        assert active.accessible_name, active.get_attribute("outerHTML")
        assert active.value_of_css_property("outline-style") == "solid"
        assert number(active.value_of_css_property("outline-width")[:-2]) >= 3
        seen.append(active.get_attribute("id") or active.text.split()[0])
    steps = ["step", "Play", "pair", "step-again", "Play", "beta-again", "text", "word-step", "Play"]
    assert seen == ["1", "2", "3", "4", "5", "beta", *steps]
    for slider in page.find_elements(By.CSS_SELECTOR, "input[type=range]"):
        assert slider.get_attribute("aria-valuetext")
    for chart in page.find_elements(By.CSS_SELECTOR, "svg.chart"):
        assert chart.get_attribute("role") == "img" and len(chart.get_attribute("aria-label")) > 40


@pytest.mark.parametrize("size", SIZES)
def test_it_fits_every_screen(page, size):
    """Nothing to scroll sideways, with the longest texts too; a panel on one screen of projector and laptop;
    type of a fortieth of a projector's height, and nowhere below 12 pixels."""
    browser.resize(page, *SIZES[size])
    page.refresh()
    press(page, "step", Keys.END)
    width, height = SIZES[size]
    longest = "is not a wonderful debut"
    assert len(longest) == frames.LONGEST
    page.execute_script(f"data.completions.forEach(c => c.text = '{longest}'); names.fill('{longest}')")
    page.execute_script("drawAll()")
    for pair in range(len(words.SHOWN)):
        page.execute_script(f"set('text', {pair}); set('pair', {27 - pair})")
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        wide = page.execute_script(
            "return [...document.querySelectorAll('body *')]"
            ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
        )
        assert wide == []
    panels = page.find_elements(By.TAG_NAME, "section")
    if size != "telephone":
        assert max(panel.size["height"] for panel in panels) <= height
    sizes = page.execute_script(
        "return ['html', 'svg text', 'small', 'thead th']"
        ".map(s => parseFloat(getComputedStyle(document.querySelector(s)).fontSize))"
    )
    assert min(sizes) >= 12
    assert sizes[0] >= (height / 40 if size == "projector" else 16)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page, scheme):
    """WCAG's contrast of 4.5 for text on its ground, and 3 for what is drawn, but for orange on white, whose
    number stands beside it."""
    emulate(page, "prefers-color-scheme", scheme)
    style = (
        "const s = getComputedStyle(document.documentElement); return s.getPropertyValue(arguments[0]).trim()"
    )

    def luminance(name: str) -> float:
        code = page.execute_script(style, name).removeprefix("#")
        code = "".join(2 * c for c in code) if len(code) == 3 else code
        channels = [int(code[k : k + 2], 16) / 255 for k in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted(map(luminance, (one, other)))
        return (high + 0.05) / (low + 0.05)

    assert (luminance("--paper") < 0.1) == (scheme == "dark")
    for ground in ("--paper", "--field"):
        assert contrast("--ink", ground) >= 7 and contrast("--soft", ground) >= 4.5
    for mark in ("--blue", "--green", "--red", "--grey"):
        assert contrast(mark, "--paper") >= 3, mark
