"""What the three algorithms share: acting, judging, advantages, objectives, engines."""
