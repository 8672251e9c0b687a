"""A headless Chromium for the tests of pages: its start, its window, its requests and its complaints."""

import json
import shutil

import pytest

FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync"
)


def start(profile):
    """The driver of a Chromium with a new profile in this folder. Skips the test where there is none."""
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is missing: requirements-bench.txt"
    )
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("chromium or chromedriver is missing")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def resize(driver, width, height):
    """Give the page a window of this size, a telephone's where it is narrow."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def requested(driver):
    """The addresses that were asked for since the last call, other than files, data and the browser's own."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("file:", "data:", "blob:", "chrome:"))]


def complaints(driver):
    """What the console has since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]
