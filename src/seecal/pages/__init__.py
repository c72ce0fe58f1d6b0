"""Pages to look at, each one HTML file that needs nothing beside it. Drawing only: numbers come from scoring/."""
