"""A labelled dataset, before anything is trained -> what is in it and what is wrong with it, on one page."""
