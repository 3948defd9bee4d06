"""A page that shows what came of a scoring run.

scored file --scored_row--> checked rows --collect--> arrays, and the few texts shown --figures--> numbers of charts
    --charts--> SVG --page--> one HTML file        OUTPUT.meta.json --run_facts--> what was run on what
"""
