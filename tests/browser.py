"""A real browser without a window, for the tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def _found(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Chromium as it is installed; nothing is downloaded."""
    binary, driver = _found(*_NAMES), _found("chromedriver")
    if binary is None or driver is None:
        pytest.skip(
            "there is no Chromium with its chromedriver here (Debian: apt install chromium chromium-driver)"
        )
    os.environ["SE_OFFLINE"] = "true"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, Service(driver))
    try:
        yield started
    finally:
        started.quit()


def open_page(driver: webdriver.Chrome, page: Path, *, width: int = 1200, scheme: str = "light") -> None:
    """Open a file as on a screen of that width, for someone who prefers that colour scheme."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for log in ("browser", "performance"):
        driver.get_log(log)  # What an earlier page said.
    driver.get(page.as_uri())


def ask(driver: webdriver.Chrome, script: str, *given: Any) -> Any:
    """What a piece of JavaScript, run by the test and not by the page, returns."""
    return driver.execute_script(script, *given)
