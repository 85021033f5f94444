"""Commands that are printed can be copied into a shell, and read."""

import random
import shlex
import subprocess

from launch.flags.quoting import join, quote


def test_a_call_with_a_text_has_one_pair_of_quotes() -> None:
    assert quote("--method=flap(structure='AL-AM')") == "\"--method=flap(structure='AL-AM')\""
    assert quote('--method=llmrank(scorer="mpr")') == "'--method=llmrank(scorer=\"mpr\")'"
    assert join(["python", "--sparsity=0.5"]) == "python --sparsity=0.5"


def test_a_shell_gives_the_words_back() -> None:
    rng = random.Random(0)
    words = [
        "".join(rng.choices("ab'\"$`\\! ()*;&|<>\n#~=", k=rng.randrange(9))) for _ in range(300)
    ]
    assert shlex.split(join(words)) == words
    said = subprocess.run(["sh", "-c", f"printf '%s\\0' {join(words)}"], capture_output=True)
    assert said.stdout.decode().split("\0")[:-1] == words
