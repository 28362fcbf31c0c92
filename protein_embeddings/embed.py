"""Run `transcriptformer embed-proteins` from this folder: `python embed.py --fasta FILE`."""

import sys
from importlib.metadata import entry_points

if __name__ == "__main__":
    (command,) = entry_points(group="console_scripts", name="transcriptformer")
    command.load()(["embed-proteins", *sys.argv[1:]])
