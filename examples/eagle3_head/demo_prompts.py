"""Prompts for the demo model, which knows what it was trained on: chats of one and two turns, a JSON list of messages a line.

python demo_prompts.py --count 4000 > prompts.jsonl
python demo_prompts.py --count 200 --held-out > held-out.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo_model"))

from recall import ask_one, fact_sheet
from skills import SKILLS, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--held-out", action="store_true", help="items that the demo model was not trained on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random = Random(options.seed + 1_000_000 * options.held_out)
    names, weights = list(SKILLS), [weight for _, weight in SKILLS.values()]
    for _ in range(options.count):
        if random.random() < 0.15:
            sheet = fact_sheet(random, random.randint(4, 20), filler=False)
            messages = [{"role": "user", "content": f"{sheet.text}\n{ask_one(random, sheet)[0]}"}]
        else:
            turns = [
                message
                for _ in range(random.randint(1, 2))
                for message in draw(random, random.choices(names, weights)[0], held_out=options.held_out).messages
            ]
            messages = [{"role": role, "content": text} for role, text in turns[:-1]]
        print(json.dumps(messages))


if __name__ == "__main__":
    main()
