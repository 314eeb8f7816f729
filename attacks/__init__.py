"""TextAttack's recipes, with resources that can be had."""
