"""Makes one page of what runs have left behind: curves, tables, bottleneck, films, settings."""
