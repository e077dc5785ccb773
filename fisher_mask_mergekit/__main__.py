"""``python -m fisher_mask_mergekit``, which launchers of several processes take."""

from fisher_mask_mergekit.cli import main

if __name__ == "__main__":
    main()
