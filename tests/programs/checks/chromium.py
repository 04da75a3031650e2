"""chromium without a screen: several processes with their own allocators, V8, and the shim beneath."""

import tempfile

from harness import WORKLOADS, check, require, require_same, tail

# As root there is no sandbox; and nothing that is not there in a container.
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
           "--hide-scrollbars", "--force-device-scale-factor=1", "--window-size=800,600"]


def _render(trial, launcher, *what):
    directory = trial.directory(launcher)
    (directory / "page.html").write_bytes((WORKLOADS / "page.html").read_bytes())
    # Its sockets' names have to be short.
    with tempfile.TemporaryDirectory(prefix="chromium-", dir="/tmp") as sockets:
        outcome = trial.run(launcher, ["chromium", *OPTIONS, f"--user-data-dir={directory / 'profile'}", *what,
                                       f"file://{directory / 'page.html'}"],
                            env={"TMPDIR": sockets}, witnesses=["chromium"], timeout=120)
    require(outcome.status == 0, f"{launcher.name}: {tail(outcome)}")
    return outcome


@check
def document(trial):
    """A page whose script allocates, sorts, compiles and draws: the same document afterwards."""
    plain, shim = (_render(trial, launcher, "--dump-dom").stdout for launcher in trial.launchers)
    require_same("document", plain, shim)
    require(b"<li>done</li>" in plain, f"the page did not run: {plain[-300:]!r}")


@check
def screenshot(trial):
    """The same page as a picture, to the pixel."""
    pictures = []
    for launcher in trial.launchers:
        _render(trial, launcher, "--screenshot=page.png", "--virtual-time-budget=5000")
        pictures.append((trial.directory(launcher) / "page.png").read_bytes())
    require_same("size of the picture", *map(len, pictures))
    require(pictures[0] == pictures[1], "the pictures differ")
    require(len(pictures[0]) > 2000, "there is nothing on the picture")
