"""The course: ten notebooks, their exercises and what checks them."""
