"""What the three algorithms share: acting, judging, objectives, networks."""
