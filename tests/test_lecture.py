"""For lecturers, and for those who cannot see: the page of derivations, slides, notebooks in JupyterLab.

The slow tests open them in a headless Chromium.
"""

import functools
import html
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import browser
import nbformat
import pytest
from document import BLOCKS
from test_notebooks import SOURCES, by_notebook, code_cells, kept, pictures, tagged

from notebooks import build, lecture, syllabus
from notebooks.stubs import SOLUTION

pytest.importorskip("math_core", reason="math-core is missing: requirements-bench.txt")
CHAPTERS = lecture.all_chapters()
OF_THE_BOOK = [text for number, text in CHAPTERS.items() if int(number) < 10]
SIZES = {"hall": (1400, 900), "large hall": (1920, 1080), "telephone": (390, 844)}
SLIDE = r"<section[^>]*>\n(.*?)</section>"


# ----------------------------------------------------------------------------------------------- equations


def test_equations_become_mathml():
    """What each command is: the fraction, the script letter, the upright word, the root."""
    page = lecture.to_html("$\\frac{\\pi_{\\rm ref}}2$, and\n\n$$\n\\mathcal L\\thinspace\\sqrt x\n$$")
    assert re.sub(r"\s|<mspace/>|</?mrow>", "", page) == (
        '<p><spanclass="mathinline"><math><mfrac><msub><mi>π</mi><mi>ref</mi></msub><mn>2</mn></mfrac></math>,</span>'
        'and</p><divclass="mathblock"><mathdisplay="block"><mi>ℒ\ufe00</mi><mspacewidth="0.16666667em"/>'
        "<msqrt><mi>x</mi></msqrt></math></div>"
    )
    with pytest.raises(lecture.InputError, match=r"the equation \\nonsense is no LaTeX"):
        lecture.to_html(r"$\nonsense$")


def test_without_math_core_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_core", None)
    lecture._markdown.cache_clear()
    with pytest.raises(lecture.InputError, match="pip install math-core"):
        lecture.to_html("$x$")


# ---------------------------------------------------------------------------------------- the lecture page


@functools.cache
def whole_page():
    """The page of all chapters."""
    return lecture.lecture_page(list(CHAPTERS.values()))


def test_the_page_has_every_section_and_every_equation():
    """Of all 15 chapters, in order; as many equations as the text has dollar signs for, and no raw one."""
    assert list(CHAPTERS) == [str(number) for number in range(15)]
    page = whole_page()
    body = page[page.index("<main>") :]
    ids = [anchor for anchor in re.findall(r'<a id="([^"]*)"></a>', body) if anchor.startswith("d")]
    assert ids == [section.anchor for section in syllabus.sections().values()]
    prose = syllabus.without_code("\n".join(CHAPTERS.values()))
    prose = re.sub(
        r"`[^`\n]*`|^## (?:Index|References)\n.*?(?=^## |\Z)", "", prose, flags=re.MULTILINE | re.DOTALL
    )
    displayed = re.findall(r"\$\$.*?\$\$", prose, re.DOTALL)
    inline = re.findall(r"\$[^$]+\$", re.sub(r"\$\$.*?\$\$", "", prose, flags=re.DOTALL))
    assert body.count("<math display") == len(displayed) > 100
    assert body.count("<math") == len(displayed) + len(inline)
    words = re.sub(r"<pre>.*?</pre>|<code>.*?</code>|<[^>]*>", "", body, flags=re.DOTALL)
    assert "$" not in words and "\\" not in words and "](" not in words


def test_the_code_stands_behind_the_switch():
    """Every block of the derivations is on the page, hidden until the switch is on."""
    page = lecture.lecture_page(OF_THE_BOOK)
    own = [block.source for block in BLOCKS if block.document == "derivations.md"]
    shown = [
        html.unescape(code).rstrip("\n")
        for code in re.findall(r"<pre><code[^>]*>(.*?)</code></pre>", page, re.DOTALL)
    ]
    assert shown == own
    assert "pre { display: none;" in page and "body:has(#code:checked) pre { display: block; }" in page


def test_links_stay_on_the_page_or_lead_to_the_web():
    """A tag of a chapter that is not on the page is a word and no link: there is no file to lead to."""
    for page in (whole_page(), lecture.lecture_page([CHAPTERS["4"]])):
        links, ids = re.findall(r'href="([^"]*)"', page), re.findall(r'id="([^"]*)"', page)
        assert len(ids) == len(set(ids))
        assert all(link.startswith("https://") or (link[0] == "#" and link[1:] in ids) for link in links)
        assert links.count("#d41-the-reward-that-a-policy-implies") >= 2
    assert "[D3.4]" in page and "#d34" not in page and "D2.2" in page
    assert whole_page().count('href="#d34-the-optimum"') > 5


def test_the_command_writes_the_chapters_that_are_asked_for(monkeypatch, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert build.main(["5", "3", "--lecture", str(path)]) == 0
    titles = re.findall(r"<h2>.*?</a>(.*?)</h2>", path.read_text(encoding="utf-8"))
    assert titles == ["3 The objective and its optimum", "5 The gradient and its weight"]
    assert build.main(["--lecture", str(path)]) == 0
    assert path.read_text(encoding="utf-8") == lecture.lecture_page(OF_THE_BOOK)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    wrong = {
        ("--lecture", "3"): "3 does not end in .html",
        ("99", "--lecture", str(path)): "no chapter 99; there are 0, 1,",
        ("--lecture", str(tmp_path / "none" / "page.html")): "there is no folder",
        ("--slides", "3"): "the numbers come first: python -m notebooks.build 3 --slides",
        ("--slides", str(path)): "is a file; --slides takes a folder",
        ("--slides", "--check"): "not allowed with",
    }
    monkeypatch.setattr(build, "is_stale", lambda *_: False)
    for arguments, told in wrong.items():
        with pytest.raises(SystemExit):
            build.main(list(arguments))
        assert told in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- slides


def test_a_slide_for_each_heading_text_and_output():
    """A heading alone is none; what would show a solution is none; code is there, but hidden. A text that
    leads to what is printed stands above it; of a question and its answer each has its own."""
    new, output = nbformat.v4, nbformat.v4.new_output
    drawn = output("display_data", {"text/html": '<img alt="a line" src="data:,">', "text/plain": "a line"})
    cells = [
        new.new_markdown_cell("# 1 · X\n\n**Before this:** y\n**Read:** 5\n\n**The claim.** $x$"),
        new.new_code_cell("setup", metadata={"tags": ["setup"]}),
        new.new_markdown_cell("## Part\n"),
        new.new_markdown_cell("**Predict before you run.** Which?"),
        new.new_code_cell("x < 1", outputs=[output("stream", text="1 < 2\n"), drawn]),
        new.new_markdown_cell("happened", metadata={"tags": ["outcome"]}),
        new.new_markdown_cell("### Two\n\n> three"),
        new.new_markdown_cell("and four:"),
        new.new_code_cell("y", outputs=[output("execute_result", {"text/plain": "4"})]),
        new.new_markdown_cell("### Five\n\n5\n\n## Six\n\n6"),
        *(new.new_markdown_cell("no", metadata={"tags": [tag]}) for tag in ("answer", "derivation")),
        *(new.new_code_cell("no", metadata={"tags": [tag]}) for tag in ("exercise", "check")),
    ]
    found = re.findall(SLIDE, lecture.slides(new.new_notebook(cells=cells)), re.DOTALL)
    assert [" ".join(re.sub(r"<math.*?</math>", "x", slide).split()) for slide in found] == [
        '<h1>1 · X</h1> <p><strong>The claim.</strong> <span class="math inline">x</span></p>',
        '<h2>Part</h2> <p class="question"><strong>Predict before you run.</strong> Which?</p>',
        '<h2>Part</h2> <pre class="source">x &lt; 1</pre>',
        '<h2>Part</h2> <pre>1 &lt; 2 </pre> <img alt="a line" src="data:,">',
        "<h2>Part</h2> <p>happened</p>",
        "<h2>Two</h2> <blockquote> <p>three</p> </blockquote>",
        '<h2>Two</h2> <pre class="source">y</pre>',
        "<h2>Two</h2> <p>and four:</p> <pre>4</pre>",
        "<h2>Five</h2> <p>5</p>",
        "<h2>Six</h2> <p>6</p>",
    ]


@by_notebook
def test_slides_show_no_solution(source):
    """No line of a solution, nor a remark after one, on any slide, hidden ones included."""
    solved = build.solved_notebook(source)
    page = html.unescape(lecture.slides(solved))
    solutions = SOLUTION.findall(source.read_text(encoding="utf-8"))
    lines = {line.strip() for _, code in solutions for line in code.split("\n") if line.strip()}
    elsewhere = "\n".join(
        cell.source for cell in code_cells(solved) if not {"exercise"} & set(cell.metadata.get("tags", []))
    )
    assert lines and not [line for line in lines if line not in elsewhere and line in page]
    remarks = [html.unescape(lecture.to_html(cell.source)) for cell in tagged(solved, "answer")]
    assert not [remark for remark in remarks if remark in page]
    assert f"Exercise {int(source.stem[:2])}.1" in page and "def " in page


def test_slides_of_a_stale_notebook_are_refused(monkeypatch, tmp_path, capsys):
    """They would show what is no longer so. Those of the others are written."""
    monkeypatch.setattr(build, "is_stale", lambda path, _: path.name.startswith("02"))
    assert build.main(["2", "3", "--slides", str(tmp_path / "slides")]) == 1
    assert capsys.readouterr().err == "02_optimum: stale; run python -m notebooks.build first\n"
    assert [path.name for path in (tmp_path / "slides").iterdir()] == ["03_dpo.html"]


# ---------------------------------------------------------------------------------- slow: in a real browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    driver = browser.start(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


def wait_for(what, seconds=60):
    """The first true answer of `what`, asked again and again."""
    end = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < end, f"nothing within {seconds} s"
        time.sleep(0.05)
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_page_in_a_browser(chromium, tmp_path, size):
    """No scrolling sideways; the first equation within two screens; the switch by keyboard; no network."""
    path = tmp_path / "page.html"
    lecture.write_lecture(path, list(CHAPTERS))
    width, height = SIZES[size]
    browser.resize(chromium, width, height)
    chromium.get(path.as_uri())
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    first = "return document.querySelector('math[display]').getBoundingClientRect().bottom"
    assert chromium.execute_script(first) <= 2 * height
    # MathML is drawn: every numerator stands above its denominator.
    assert chromium.execute_script("""
        const top = part => part.getBoundingClientRect().top;
        const fractions = [...document.querySelectorAll("mfrac")].map(fraction => fraction.children);
        return fractions.length > 100 && fractions.every(parts => top(parts[0]) < top(parts[1]));
    """)
    visible = "return [...document.querySelectorAll('pre')].filter(p => p.offsetHeight > 0).length"
    assert chromium.execute_script(visible) == 0
    chromium.find_element("id", "code").send_keys(" ")
    assert chromium.execute_script(visible) == chromium.execute_script(
        "return document.querySelectorAll('pre').length"
    )
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    chromium.find_element("css selector", 'nav a[href^="#4-from"]').send_keys("\ue007")  # enter
    place = "return document.querySelector('[id^=\"4-from\"]').getBoundingClientRect().top"
    assert abs(chromium.execute_script(place)) < 90  # of 844 pixels or more
    assert browser.requested(chromium) == [] and browser.complaints(chromium) == []


MEASURE = """
    const shownNow = () => {
      const slide = document.querySelector(".shown"), inside = slide.getBoundingClientRect();
      const parts = [...slide.querySelectorAll(":scope > *, :scope > p > *, math, img")];
      return {
        place: document.getElementById("place").textContent,
        overflow: Math.max(slide.scrollHeight - slide.clientHeight, slide.scrollWidth - slide.clientWidth,
          ...parts.map(part => part.scrollWidth - part.clientWidth)),
        outside: parts.map(part => part.getBoundingClientRect()).filter(box => box.top < 0 || box.left < 0
          || box.right > innerWidth || box.bottom > Math.min(innerHeight, inside.bottom + 1)).length,
        heading: slide.firstElementChild.matches("h1, h2") && slide.firstElementChild.offsetHeight > 0,
        words: [...slide.children].slice(1).map(part => part.innerText.trim()).join(" "),
        type: Math.min(...[...slide.children].map(part => parseFloat(getComputedStyle(part).fontSize))),
        pictures: [...slide.querySelectorAll("img")].map(img => [img.alt, img.naturalWidth, img.width]),
        code: slide.classList.contains("of-code"),
      };
    };
    return slides().map((_, number) => { show(number); return shownNow(); });"""


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES[:3], ids=lambda source: source.stem)
def test_slides_in_a_browser(chromium, tmp_path, source):
    """At 1400 x 900: nothing is cut or runs out of a slide, none is blank, every picture is described.
    Legible from the back: type of at least 18 of a slide's 900 pixels, pictures of 640. No network."""
    notebook = kept(build.solved_path(source))
    (path,) = lecture.write_slides(tmp_path, {source.stem: notebook})
    browser.resize(chromium, 1400, 900)
    chromium.get(path.as_uri())
    wait_for(lambda: chromium.execute_script("return 'ready' in document.body.dataset"))
    body = chromium.find_element("tag name", "body")
    without_code = chromium.execute_script(MEASURE)
    body.send_keys("c")
    with_code = chromium.execute_script(MEASURE)
    for found in (without_code, with_code):
        for number, slide in enumerate(found, start=1):
            assert slide["place"] == f"{number} / {len(found)}"
            assert slide["overflow"] <= 1 and slide["outside"] == 0, slide  # browsers round to whole pixels
            assert slide["heading"] and (slide["words"] or slide["pictures"]), slide
            assert slide["type"] >= 18, slide
            assert all(alt and natural and shown >= 640 for alt, natural, shown in slide["pictures"]), slide
    assert [slide for slide in with_code if not slide["code"]] != without_code  # their places have changed
    assert not any(slide["code"] for slide in without_code) and any(slide["code"] for slide in with_code)
    described = {alt for slide in without_code for alt, _, _ in slide["pictures"]}
    assert described == {alt for cell in code_cells(notebook) for alt, _ in pictures(cell)} != set()
    assert browser.requested(chromium) == [] and browser.complaints(chromium) == []


@pytest.mark.slow
def test_slides_by_keyboard(chromium, tmp_path):
    """Arrows, page keys of a presenter, home and end; the place is kept in the address; what is printed and
    too long for a slide goes on, line by line; a block that is too wide is set smaller."""
    new, lines = nbformat.v4, [f"line {number}" for number in range(100)]
    printed = new.new_output("stream", text="\n".join(lines))
    equation = " + ".join(["\\frac{x}{y}"] * 25)
    cells = [new.new_markdown_cell("# 1 · X\n\nwords"), new.new_code_cell("print()", outputs=[printed])]
    cells += [
        new.new_markdown_cell("## Long\n\n" + "\n\n".join(lines)),
        new.new_markdown_cell(f"$${equation}$$"),
    ]
    (path,) = lecture.write_slides(tmp_path, {"long": new.new_notebook(cells=cells)})
    browser.resize(chromium, 1400, 900)
    chromium.get(path.as_uri())
    wait_for(lambda: chromium.execute_script("return 'ready' in document.body.dataset"))
    found = chromium.execute_script(MEASURE)
    assert all(slide["overflow"] <= 1 and slide["outside"] == 0 and slide["type"] >= 18 for slide in found)
    assert " ".join(slide["words"] for slide in found[1:-1]).split() == " ".join(lines * 2).split()
    assert found[-1]["type"] < 39  # pixels, the size of other equations
    body, last = chromium.find_element("tag name", "body"), len(found)
    place = chromium.find_element("id", "place")
    arrow_left, arrow_right, page_down, home, end = "\ue012", "\ue014", "\ue00f", "\ue011", "\ue010"
    for key, number in ((home, 1), (arrow_left, 1), (arrow_right, 2), (page_down, 3), (" ", 4), (end, last)):
        body.send_keys(key)
        assert place.text == f"{number} / {last}" and chromium.current_url.endswith(f"#{number}")
    body.send_keys(arrow_right, arrow_left)
    chromium.refresh()
    wait_for(lambda: chromium.execute_script("return 'ready' in document.body.dataset"))
    assert chromium.find_element("id", "place").text == f"{last - 1} / {last}"


# The whole notebook is drawn, not only what the window shows.
SETTINGS = {"@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"}}


@pytest.fixture
def jupyterlab(tmp_path):
    """The address of a JupyterLab whose folder holds solved notebook 3 alone, which nobody has trusted."""
    folder, home = tmp_path / "alone", tmp_path / "home"
    folder.mkdir()
    (folder / "solved.ipynb").write_bytes(build.solved_path(SOURCES[2]).read_bytes())
    for name, content in SETTINGS.items():
        (home / "settings" / name).parent.mkdir(parents=True)
        (home / "settings" / name).write_text(json.dumps(content))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--LabApp.news_url="]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    surroundings = os.environ | folders | {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=surroundings, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"

    def answers():
        assert server.poll() is None, (home / "log").read_text()
        try:
            return urllib.request.urlopen(f"{address}/api").read()
        except OSError:
            return None

    try:
        wait_for(answers)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_a_notebook_in_jupyterlab(chromium, jupyterlab):
    """A solved notebook that stands alone and that nobody has trusted: every picture is drawn and described;
    a click opens each derivation, with its equations drawn, no TeX left, and no link to another file."""
    notebook = kept(build.solved_path(SOURCES[2]))
    browser.resize(chromium, 1400, 900)
    chromium.get(f"{jupyterlab}/doc/tree/solved.ipynb")
    drawn = "return document.querySelectorAll('.jp-Notebook .jp-Cell').length"
    wait_for(lambda: chromium.execute_script(drawn) == len(notebook.cells))

    described = [[alt, True] for cell in code_cells(notebook) for alt, _ in pictures(cell)]
    images = (
        "return [...document.querySelectorAll('.jp-OutputArea img')].map(i => [i.alt, i.naturalWidth > 0])"
    )
    assert len(described) >= 3
    wait_for(lambda: chromium.execute_script(images) == described)

    derivations = [cell.source for cell in tagged(notebook, "derivation")]
    wanted = re.findall("<summary>(.*?)</summary>", "".join(derivations))
    found = chromium.find_elements("css selector", ".jp-RenderedMarkdown details")
    assert [part.text for part in found] == wanted != []  # closed: only the summary is to be seen
    for part, title in zip(found, wanted):
        text = syllabus.without_code(syllabus.sections()[re.search(r"D\d+\.\d+", title)[0]].text)
        equations = re.findall(r"\$\$.*?\$\$|\$[^$]+\$", text, re.DOTALL)
        chromium.execute_script("arguments[0].scrollIntoView()", part)
        part.find_element("tag name", "summary").click()
        rendered = part.find_elements("tag name", "mjx-container")
        assert len(rendered) == len(equations) and all(each.size["height"] > 5 for each in rendered), title
        assert not re.search(r"\$|\\|\]\(", part.text), title
        assert not part.find_elements("css selector", "a[href]:not([href^=https])"), title
    assert not [url for url in browser.requested(chromium) if "127.0.0.1" not in url]


@pytest.mark.slow
def test_figures_are_described_by_nbconvert():
    """In the HTML that a teacher makes of a solved notebook; nowhere is a picture without a description."""
    from nbconvert import HTMLExporter

    notebook = kept(build.solved_path(SOURCES[2]))
    page, _ = HTMLExporter().from_notebook_node(notebook)
    images = re.findall(r"<img[^>]*>", page)
    found = [html.unescape(re.search(r'alt="([^"]*)"', image)[1]) for image in images]
    assert found == [alt for cell in code_cells(notebook) for alt, _ in pictures(cell)] and len(found) >= 3
    assert page.count("<summary>Derivation of D4.1") == 1
