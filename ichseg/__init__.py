"""Everything inference needs: volume in, segmentation out."""
