from rltrain.cli.app import main

main()
