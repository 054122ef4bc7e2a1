"""`dypo study`: methods x seeds x base policies x worlds, each combination one run of a recipe.

layout.py    what a study consists of: its runs, their folders, their recipes
cells.py     one run: what it shares, whether it is finished, what is left to do
schedule.py  many runs side by side, as processes of the ordinary command
tied.py      which end with the study
results.py   SQL over the finished runs; comparisons between them
report.py    one HTML file and one Markdown file of that
"""
