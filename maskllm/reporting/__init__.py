"""What the reports of the pipelines share: numbers as text, charts, the page, the files."""
