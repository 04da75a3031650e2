#!/usr/bin/env python3
"""`freehold report` of a running redis-server, rendered by Chromium: in light and in dark, and at the width of a phone."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest
import zlib

FREEHOLD = os.path.abspath("runtime/cli/freehold")  # tests run in the root of the source tree
PHONE = 390
DESKTOP = 1100
LIGHT_BACK = (255, 255, 255)
DARK_BACK = (13, 17, 23)
SCHEMES = {"light": "1", "dark": "0"}  # as Chromium's preferredColorScheme has them

# Renders a page in frames of several widths, and says of each in JSON how wide its content is, and how well each kind of
# text stands out from the page, as WCAG 2 counts it.
PROBE = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><body><script>
const page = %s, widths = %s, found = {};
function luminance(color) {
  const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map(c => c / 255)
      .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(one, two) {
  const [low, high] = [luminance(one), luminance(two)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
function measure(frame) {
  const inner = frame.contentWindow, root = inner.document.documentElement;
  const back = inner.getComputedStyle(inner.document.body).backgroundColor;
  const texts = {};
  for (const element of root.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const name = element.tagName + "." + element.className;
    if (own) texts[name] = Math.min(texts[name] ?? 21, contrast(inner.getComputedStyle(element).color, back));
  }
  const drawings = {};
  for (const element of root.querySelectorAll("rect.one, path.one, path.two")) {
    const style = inner.getComputedStyle(element);
    const color = element.tagName === "rect" ? style.fill : style.stroke;
    drawings[element.tagName + "." + element.getAttribute("class")] = contrast(color, back);
  }
  const strips = [...root.querySelectorAll("svg.strip")].map(strip => strip.getBoundingClientRect().width);
  found[frame.width] = {content: root.scrollWidth, visible: root.clientWidth, texts, drawings, strips, back};
  if (Object.keys(found).length === widths.length) document.body.textContent = JSON.stringify(found);
}
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 2000; frame.srcdoc = page;
  frame.onload = () => measure(frame);
  document.body.append(frame);
}
</script></body>
"""


def paeth(left, up, corner):
    distances = [abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)]
    return (left, up, corner)[distances.index(min(distances))]


def read_png(path):
    """Rows of pixels, (red, green, blue) each. Knows what Chromium writes: 8 bits, no palette, not interlaced."""
    with open(path, "rb") as file:
        data = file.read()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("not a PNG file")
    at, packed, header = 8, b"", None
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + length]
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            packed += body
        at += length + 12
    width, height, depth, color, _, _, interlaced = header
    if depth != 8 or color not in (2, 6) or interlaced:
        raise ValueError(f"not a PNG file that is read here: {header}")
    channels = 3 if color == 2 else 4
    raw, stride = zlib.decompress(packed), width * channels
    rows, above = [], bytes(stride)
    for y in range(height):
        kind, *line = raw[y * (stride + 1):(y + 1) * (stride + 1)]
        for x in range(stride if kind else 0):
            left = line[x - channels] if x >= channels else 0
            corner = above[x - channels] if x >= channels else 0
            predicted = (0, left, above[x], (left + above[x]) // 2, paeth(left, above[x], corner))[kind]
            line[x] = (line[x] + predicted) & 255
        above = line
        rows.append([tuple(line[x:x + 3]) for x in range(0, stride, channels)])
    return rows


def share_of(color, rows):
    return sum(row.count(color) for row in rows) / (len(rows) * len(rows[0]))


class ReportBrowserTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.mkdtemp(prefix="freehold-report-browser-")
        environment = {**os.environ, "FREEHOLD_RECORD_RANGE_LOCKS": "1"}
        socket = os.path.join(cls.directory, "redis.sock")
        # pylint: disable=consider-using-with
        cls.redis = subprocess.Popen([FREEHOLD, "run", "--", "redis-server", "--port", "0", "--unixsocket", socket,
                                      "--save", "", "--dir", cls.directory], env=environment,
                                     stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not os.path.exists(socket) and time.monotonic() < deadline:
            time.sleep(0.05)
        load = subprocess.Popen(["redis-benchmark", "-s", socket, "-t", "set", "-d", "2000", "-r", "100000", "-P", "8",
                                 "-n", "100000000", "-q"], stdout=subprocess.DEVNULL)
        time.sleep(1)
        cls.report = os.path.join(cls.directory, "report.html")
        try:
            subprocess.run([FREEHOLD, "report", str(cls.redis.pid), "-o", cls.report, "--seconds=2"], check=True)
        finally:
            load.kill()
            load.wait()
        with open(cls.report, encoding="utf-8") as file:
            cls.html = file.read()

    @classmethod
    def tearDownClass(cls):
        cls.redis.send_signal(signal.SIGTERM)
        cls.redis.wait()
        shutil.rmtree(cls.directory)

    def chromium(self, scheme, *arguments):
        result = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                                 "--user-data-dir=" + os.path.join(self.directory, "profile"),
                                 "--blink-settings=preferredColorScheme=" + SCHEMES[scheme], *arguments],
                                capture_output=True, text=True, timeout=120, check=False)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def measure(self, scheme, html):
        """What PROBE finds: by the width of the frame."""
        probe = os.path.join(self.directory, "probe.html")
        with open(probe, "w", encoding="utf-8") as file:
            # A script ends at its end tag, wherever that stands.
            file.write(PROBE % (json.dumps(html).replace("</", "<\\/"), json.dumps([PHONE, DESKTOP])))
        dom = self.chromium(scheme, "--virtual-time-budget=10000", "--dump-dom", "file://" + probe)
        found = json.loads(re.search(r"<body>(\{.*\})\s*</body>", dom, re.DOTALL).group(1))
        self.assertEqual(set(found), {str(PHONE), str(DESKTOP)})
        return found

    def screenshot(self, scheme):
        path = os.path.join(self.directory, scheme + ".png")
        self.chromium(scheme, f"--window-size={DESKTOP},800", "--screenshot=" + path, "file://" + self.report)
        return read_png(path)

    def test_both_schemes_have_colours_of_their_own(self):
        light, dark = self.screenshot("light"), self.screenshot("dark")
        self.assertEqual((len(light), len(light[0])), (len(dark), len(dark[0])))
        self.assertGreater(share_of(LIGHT_BACK, light), 0.5)
        self.assertGreater(share_of(DARK_BACK, dark), 0.5)
        self.assertEqual(share_of(DARK_BACK, light), 0)
        self.assertLess(share_of(LIGHT_BACK, dark), 0.001)
        # The address space is drawn, in either's colour.
        self.assertGreater(share_of((0x0b, 0x5c, 0xad), light), 0.01)
        self.assertGreater(share_of((0x6c, 0xb6, 0xff), dark), 0.01)

    def test_everything_can_be_read(self):
        for scheme in SCHEMES:
            for width, page in self.measure(scheme, self.html).items():
                with self.subTest(scheme=scheme, width=width):
                    self.assertLessEqual(page["content"], page["visible"], "it scrolls sideways")
                    self.assertGreaterEqual(page["visible"], int(width) - 2)
                    self.assertGreater(len(page["strips"]), 2)
                    self.assertGreater(min(page["strips"]), int(width) * 0.5 if int(width) == PHONE else 800)
                    self.assertTrue({"H1.", "P.quiet", "FIGCAPTION.", "TD.n"} <= set(page["texts"]), page["texts"])
                    for text, contrast in page["texts"].items():
                        self.assertGreaterEqual(contrast, 4.5, text)
                    for drawing, contrast in page["drawings"].items():
                        self.assertGreaterEqual(contrast, 3, drawing)

    def test_the_probe_finds_what_is_wrong(self):
        wide = self.html.replace("<main>", "<main><p style=\"width: 600px; color: rgb(128, 128, 128)\">wide</p>")
        found = self.measure("light", wide)
        self.assertGreater(found[str(PHONE)]["content"], PHONE)
        self.assertLessEqual(found[str(DESKTOP)]["content"], found[str(DESKTOP)]["visible"])
        self.assertLess(found[str(PHONE)]["texts"]["P."], 4.5)


if __name__ == "__main__":
    unittest.main()
