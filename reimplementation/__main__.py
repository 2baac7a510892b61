from reimplementation.cli import main

raise SystemExit(main())
