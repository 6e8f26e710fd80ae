"""Memory of reading and decoding, which threads give back."""

import subprocess
import sys
import tracemalloc

from PIL import Image

from lsg_jax.files import read_regular

HELD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from lsg_jax.data.images import open_image
resident = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) >> 10
before = resident()
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda _: open_image(open(sys.argv[1], "rb").read()).size, range(16)))
    print(resident() - before)
"""


def test_threads_do_not_keep_the_memory_of_images(tmp_path):
    """Eight threads decode images of 120 MiB in turn; each kept that of its last one."""
    Image.new("RGB", (6000, 5000)).save(tmp_path / "large.png")
    held = subprocess.run([sys.executable, "-c", HELD, tmp_path / "large.png"], capture_output=True, text=True, check=True)
    assert int(held.stdout) < 100


def test_a_small_file_is_read_in_little_memory(tmp_path):
    """Each thread of `lsg prepare` took the 64 MiB of the limit for a file of a kilobyte."""
    (tmp_path / "small").write_bytes(bytes(1000))
    tracemalloc.start()
    read_regular(tmp_path / "small", limit=1 << 26)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
