"""The course: nine notebooks, their exercises and what checks them."""
