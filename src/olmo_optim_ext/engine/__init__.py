"""What every optimizer stands on: state, loops, roles and exchange. Knows no update rule."""
