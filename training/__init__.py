"""Everything only training needs: planning, preprocessing, training, evaluation, export."""
