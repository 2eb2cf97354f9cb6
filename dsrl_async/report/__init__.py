"""Makes one self-contained page of what runs have left behind: curves, tables, bottleneck, films, settings."""
