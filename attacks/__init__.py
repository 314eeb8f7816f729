"""TextAttack's recipes against a model of this project, with resources that need no network."""
